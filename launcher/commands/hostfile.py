"""``zerofit hostfile``: write a hostfile from Slurm, a machine file or a list of hosts."""

from __future__ import annotations

import os
from pathlib import Path

import click

from launcher.commands.options import existing_or_new
from launcher.console import say, say_aside


@click.command()
@click.argument("hosts", nargs=-1, metavar="[HOSTS]…")
@click.option("--machine-file", type=existing_or_new, help="Take the hosts of an MPI machine file.")
@click.option("--slots", type=click.IntRange(min=1), help="GPUs of each host; else they are asked.")
@click.option("--output", "-o", type=existing_or_new, help="File to write; default: print it.")
def hostfile(
    *, hosts: tuple[str, ...], machine_file: Path | None, slots: int | None, output: Path | None
) -> None:
    """Write a hostfile for HOSTS (node[01-16] gpu1), a machine file, or this Slurm job.

    Where the number of GPUs is not given, each host is asked over ssh; a host without GPUs gets
    one slot.
    """
    from launcher.allocation import current_allocation
    from launcher.dispatch.find_slots import with_slots
    from launcher.errors import HostfileError
    from launcher.given_file import read_given
    from launcher.hostfile import render_hostfile
    from launcher.machine_file import hosts_of_node_list, parse_machine_file
    from launcher.run_dir import create_file

    allocation = current_allocation()
    if hosts and machine_file is not None:
        raise HostfileError(
            "hosts and a machine file are both given", where="command line", fix="give one of them"
        )
    found: dict[str, int | None]
    if machine_file is not None:
        given = read_given(machine_file, error=HostfileError, fix="name MPI's machine file")
        found = parse_machine_file(given, source=str(machine_file))
    elif hosts:
        names = hosts_of_node_list(",".join(hosts), where="command line")
        found = dict.fromkeys(names)
    elif allocation is not None:
        where = "SLURM_JOB_NODELIST"
        names = hosts_of_node_list(os.environ[where], where=where)
        found = dict.fromkeys(names, allocation.gpus_per_node)
    else:
        raise HostfileError(
            "no hosts are named, and this is not inside a Slurm job",
            where="command line",
            fix="name them, like: zerofit hostfile node[01-16]",
        )
    if slots is not None:
        found = dict.fromkeys(found, slots)
    text = render_hostfile(with_slots(found, say=say_aside))
    if output is None:
        say(text.rstrip())
    else:
        create_file(output, text)
        say(f"wrote {output}: {len(found)} host{'' if len(found) == 1 else 's'}")
