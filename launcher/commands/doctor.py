"""``zerofit doctor``: is this machine ready, and are the nodes of a cluster?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from launcher.commands.options import existing_or_new, json_option, recipe_args
from launcher.console import out, say


@click.command()
@recipe_args
@click.option("--hostfile", type=existing_or_new, help="Check the hosts of this file instead.")
@click.option("--output", "-o", type=existing_or_new, help="Also write the JSON to this file.")
@click.option(
    "--exclude-bad",
    type=existing_or_new,
    metavar="FILE",
    help="Go on without nodes that fail: write a hostfile of the others.",
)
@click.option("--no-measure", is_flag=True, help="Leave out matrix products and all-reduces.")
@json_option
def doctor(
    *,
    args: tuple[str, ...],
    hostfile: Path | None,
    output: Path | None,
    exclude_bad: Path | None,
    no_measure: bool,
    as_json: bool,
) -> None:
    """Check this machine, or all nodes of a hostfile or of the Slurm job around it.

    With a RECIPE, also what it needs of every node: model and data with the same content, disk,
    memory. Nodes are compared, and the network between them is measured; the JSON is what
    `zerofit plan --measured FILE` reads. Exit status 2 when something fails.
    """
    from launcher.nodes_check import check_nodes

    made = check_nodes(args, hostfile, measure=not no_measure)
    if made is None:
        if output is not None or exclude_bad is not None:
            raise click.UsageError(
                "--output and --exclude-bad are for several nodes: name them with --hostfile"
            )
        _check_this_machine(as_json=as_json)
        return
    from launcher.dispatch.preflight_view import render_preflight
    from launcher.hostfile import render_hostfile
    from launcher.run_dir import create_file

    text = json.dumps(made.to_json(), indent=1)
    if output is not None:
        create_file(output, text + "\n")
    if as_json:
        print(text)
    else:
        out.print(render_preflight(made))
    is_ready = made.is_ready
    if exclude_bad is not None and made.good:
        create_file(exclude_bad, render_hostfile(made.good))
        is_ready = made.rates_problem is None
        if not as_json:
            num_hosts = len(made.good)
            say(f"wrote {exclude_bad}: {num_hosts} host{'' if num_hosts == 1 else 's'}")
    if not is_ready:
        raise SystemExit(2)


def _check_this_machine(*, as_json: bool) -> None:
    from launcher.dispatch.doctor import render_checks, run_checks

    checks = run_checks()
    if as_json:
        print(json.dumps([check.to_json() for check in checks], indent=1))
    else:
        out.print(render_checks(checks))
    if any(check.status == "fail" for check in checks):
        raise SystemExit(2)
