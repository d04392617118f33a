"""How many GPUs hosts have, asked over ssh where it is not known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from launcher.dispatch.local import choose_port
from launcher.dispatch.on_nodes import run_by_ssh
from launcher.dispatch.preflight import REPORT_MODULE
from launcher.errors import HostfileError, list_problems
from launcher.hostfile import Host

_ANSWER_SECONDS = 25.0


def with_slots(slots: Mapping[str, int | None], *, say: Callable[[str], None]) -> tuple[Host, ...]:
    """Return the hosts, those without a number of slots asked for their GPUs.

    Args:
        slots: by host, in the order to keep; ``None`` where it is to be found out.
        say: is told of hosts without GPUs, which get one slot.

    Raises:
        HostfileError: a host does not answer; all such are listed.
    """
    unknown = [name for name, number in slots.items() if number is None]
    args = ["--port", str(choose_port())] if unknown else []
    found = dict(slots)
    problems, fixes = [], []
    for answer in run_by_ssh(
        unknown, REPORT_MODULE, lambda _: args, timeout_seconds=_ANSWER_SECONDS
    ):
        if answer.value is None:
            problems.append(f"{answer.host}: {answer.problem}")
            fixes.append(answer.fix)
            continue
        num_gpus = len(answer.value["gpu_names"])
        if num_gpus == 0:
            say(f"{answer.host} has no GPU: one slot, for ranks on the processor")
        found[answer.host] = max(1, num_gpus)
    if problems:
        raise HostfileError(list_problems(problems), where="hosts", fix=fixes[0])
    return tuple(Host(name=name, slots=number or 1) for name, number in found.items())
