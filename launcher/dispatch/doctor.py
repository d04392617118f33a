"""``zerofit doctor``: every check of this machine, and the table that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from launcher.dispatch import check_machine, check_software
from launcher.dispatch.check import Check, fail, run_guarded
from launcher.dispatch.probe import ProbedMachine, probe_machine
from launcher.errors import LauncherError

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run_checks() -> list[Check]:
    """Run every check; one that breaks is reported as failed and hides no other."""
    try:
        machine = probe_machine()
    except LauncherError as error:
        return [fail("this machine", error.problem, error.fix), *_checks_without_probe()]
    return [*_checks_of_probe(machine), *_checks_without_probe()]


def _checks_of_probe(machine: ProbedMachine) -> Iterator[Check]:
    yield from run_guarded("GPUs", lambda: check_machine.check_gpus(machine))
    yield from run_guarded("NVIDIA driver", lambda: check_machine.check_driver(machine))
    yield from run_guarded("host", lambda: check_machine.check_host(machine))
    yield from run_guarded("torch build", lambda: check_software.check_torch_build(machine))
    yield from run_guarded("compilers", lambda: check_software.check_compilers(machine))
    yield from run_guarded("limits", lambda: check_machine.check_limits(machine))


def _checks_without_probe() -> Iterator[Check]:
    yield from run_guarded("python", check_software.check_python)
    yield from run_guarded("packages", check_software.check_packages)
    yield from run_guarded("deepspeed launcher", check_software.check_deepspeed_launcher)
    yield from run_guarded("TORCH_CUDA_ARCH_LIST", check_software.check_arch_list)
    yield from run_guarded("numactl", check_software.check_numactl)
    yield from run_guarded("libaio", check_software.check_libaio)
    yield from run_guarded("shared memory", check_machine.check_shared_memory)
    yield from run_guarded("disks", check_machine.check_disks)
    yield from run_guarded("host name", check_machine.check_hostname)


def render_checks(checks: Sequence[Check]) -> Table:
    """Return the checks as a table for the terminal; what to do stands below each value."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "check", "found"):
        table.add_column(title, overflow="fold")
    for check in checks:
        found = Text(check.value)
        if check.fix:
            found.append(f"\nfix: {check.fix}", style="italic")
        table.add_row(Text(check.status, style=_STYLES[check.status]), Text(check.name), found)
    return table
