"""Look at all nodes before a job: each one's report, compared, and the network between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.dispatch.local import choose_port
from launcher.dispatch.node_report import MISSING, NodeReport, report_from_json
from launcher.dispatch.on_nodes import Answer, run_by_srun, run_by_ssh
from launcher.dispatch.process_group import SHARED_MEMORY
from launcher.hostfile import Host
from launcher.units import GIB, format_bytes

REPORT_MODULE = "launcher.dispatch.node_report"
FABRIC_MODULE = "launcher.worker.fabric"
MEASURED_SCHEMA = 1
# A first import from a network file system; all nodes at once.
_REPORT_SECONDS = 25.0
_FABRIC_SECONDS = 45.0
# Certificates and file times go wrong with more; NTP keeps it below 0.1 s.
_MAX_SKEW_SECONDS = 5.0
# Docker's default of 64 MiB does not hold one rank's buffer of DeepSpeed's CPU all-reduce (69 MB).
_LEAST_SHARED_MEMORY_BYTES = GIB
_FEW_OPEN_FILES = 1024
_MAX_ASKED_AGAIN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a job wants of every node; ``None`` and empty where no job was named."""

    paths: tuple[Path, ...] = ()
    """Model and data, which all nodes must see alike."""
    run_parent: Path | None = None
    disk_bytes: int = 0
    host_memory_bytes: int = 0
    gpus_per_node: int | None = None
    gpu_memory_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what :func:`needs_from_json` reads back."""
        texts = {"paths": [str(path) for path in self.paths]}
        return asdict(self) | texts | {"run_parent": self.run_parent and str(self.run_parent)}


def needs_from_json(value: Mapping[str, Any]) -> Needs:
    """Read needs back.

    Raises:
        ValueError: the mapping holds something else.
    """
    try:
        parent = value["run_parent"]
        paths = tuple(Path(path) for path in value["paths"])
        return Needs(**{**value, "paths": paths, "run_parent": parent and Path(parent)})
    except (TypeError, KeyError) as error:
        raise ValueError(f"not the needs of a job: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node with its report, and every reason not to use it."""

    host: Host
    report: NodeReport | None
    skew_seconds: float | None = None
    """How far its clock is ahead of ours."""
    problems: tuple[str, ...] = ()
    fix: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the node can take part."""
        return not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """All nodes, and the rates measured between the good ones."""

    nodes: tuple[Node, ...]
    rates: dict[str, float | None] = field(default_factory=dict)
    rates_problem: str | None = None

    @property
    def good(self) -> tuple[Host, ...]:
        """The hosts that can take part."""
        return tuple(node.host for node in self.nodes if node.is_good)

    @property
    def is_ready(self) -> bool:
        """Whether a job can start on all nodes."""
        return all(node.is_good for node in self.nodes) and self.rates_problem is None

    def to_json(self) -> dict[str, Any]:
        """Return what ``zerofit plan --measured`` reads, with each node's state."""
        names = ("intra_node_all_reduce", "inter_node_all_reduce")
        rates = {f"{name}_gbit_per_s": self.rates.get(f"{name}_gbit_per_s") for name in names}
        return {
            "schema": MEASURED_SCHEMA,
            **rates,
            "gemm_tflop_per_s": self.rates.get("gemm_tflop_per_s"),
            "host_autograd_op_microseconds": self.rates.get("host_autograd_op_microseconds"),
            "rates_problem": self.rates_problem,
            "hosts": [
                {
                    "name": node.host.name,
                    "slots": node.host.slots,
                    "ok": node.is_good,
                    "problems": list(node.problems),
                    "clock_skew_seconds": node.skew_seconds,
                    **(_report_json(node.report) if node.report else {}),
                }
                for node in self.nodes
            ],
        }


def check_hosts(hosts: Sequence[Host], needs: Needs, *, measure: bool = True) -> Preflight:
    """Look at the hosts of a hostfile through ssh.

    Args:
        hosts: at least one.
        needs: of the job to come.
        measure: whether to run matrix products and all-reduces between the good hosts.
    """
    port = choose_port()
    args = _report_args(needs, port)
    names = [host.name for host in hosts]
    answers = run_by_ssh(names, REPORT_MODULE, lambda _: args, timeout_seconds=_REPORT_SECONDS)
    nodes = judge(hosts, answers, needs)
    made = Preflight(nodes=nodes)
    if not measure or not made.good:
        return made
    good = made.good

    def fabric_args(index: int) -> list[str]:
        return [
            *_fabric_args(good[0].name, port, min(host.slots for host in good)),
            *("--node-rank", str(index), "--num-nodes", str(len(good))),
        ]

    answers = run_by_ssh(
        [host.name for host in good], FABRIC_MODULE, fabric_args, timeout_seconds=_FABRIC_SECONDS
    )
    return _with_rates(made, [answer.value for answer in answers if answer.value], answers)


def check_allocation(
    names: Sequence[str],
    needs: Needs,
    *,
    ranks_per_node: int,
    num_wanted: int | None = None,
    measure: bool = True,
) -> Preflight:
    """Look at the nodes of the Slurm allocation that we are in, through srun.

    Args:
        names: of the nodes, as ``scontrol show hostnames`` has them.
        needs: of the job to come.
        ranks_per_node: GPUs, or processes where there are none.
        num_wanted: nodes that the job will use; by default all that are good.
        measure: whether to run matrix products and all-reduces between the first good nodes.
    """
    port = choose_port()
    hosts = [Host(name=name, slots=ranks_per_node) for name in names]
    values, said = _report_by_srun(names, needs, port)
    by_host = {value.get("host"): value for value in values}
    # One node on which nothing can be started ends srun's step on all: ask each by itself.
    silent_names = [name for name in names if name not in by_host][:_MAX_ASKED_AGAIN]
    if by_host.keys() < set(names) and len(names) > 1:
        with ThreadPoolExecutor(max_workers=_MAX_ASKED_AGAIN) as pool:
            for again, _ in pool.map(
                lambda name: _report_by_srun([name], needs, port), silent_names
            ):
                by_host |= {value.get("host"): value for value in again}
    now = max((value.get("clock_seconds", 0.0) for value in by_host.values()), default=0.0)
    silent = f"srun brought no report of it: {said or 'it said nothing'}"
    answers = [
        Answer(host=name, value=by_host[name], at_seconds=now)
        if name in by_host
        else Answer(host=name, problem=silent, fix=f"see `scontrol show node {name}`")
        for name in names
    ]
    made = Preflight(nodes=judge(hosts, answers, needs))
    chosen = [host.name for host in made.good][:num_wanted]
    if not measure or not chosen or len(chosen) < (num_wanted or 0):
        return made
    values, said = run_by_srun(
        FABRIC_MODULE,
        _fabric_args(chosen[0], port, ranks_per_node),
        nodes=chosen,
        timeout_seconds=_FABRIC_SECONDS,
    )
    return _with_rates(made, values, [Answer(host=chosen[0], problem=said)])


def _report_by_srun(
    names: Sequence[str], needs: Needs, port: int
) -> tuple[list[dict[str, Any]], str]:
    args = _report_args(needs, port)
    return run_by_srun(REPORT_MODULE, args, nodes=names, timeout_seconds=_REPORT_SECONDS)


def judge(hosts: Sequence[Host], answers: Sequence[Answer], needs: Needs) -> tuple[Node, ...]:
    """Say of each node whether it can take part; pure.

    What must be equal is compared with what most nodes have.
    """
    nodes = []
    for host, answer in zip(hosts, answers, strict=True):
        if answer.value is None:
            problem = answer.problem or "no answer"
            nodes.append(Node(host=host, report=None, problems=(problem,), fix=answer.fix))
            continue
        try:
            report = report_from_json(answer.value)
        except (KeyError, TypeError):
            problem = "its report is of another version of zerofit"
            fix = "install the same version on all hosts, or in a folder that they share"
            nodes.append(Node(host=host, report=None, problems=(problem,), fix=fix))
            continue
        skew = report.clock_seconds - answer.at_seconds
        nodes.append(Node(host=host, report=report, skew_seconds=round(skew, 2)))
    usual = _usual([node.report for node in nodes if node.report is not None])
    first = hosts[0].name
    return tuple(
        replace(
            node,
            problems=(
                *_own_problems(node, needs, is_first=node.host.name == first),
                *_differences(node.report, usual),
            ),
        )
        if node.report is not None
        else node
        for node in nodes
    )


def _own_problems(node: Node, needs: Needs, *, is_first: bool) -> list[str]:
    report, found = node.report, []
    assert report is not None
    wanted = needs.gpus_per_node or node.host.slots
    if (report.gpu_names or needs.gpus_per_node) and len(report.gpu_names) < wanted:
        found.append(f"{len(report.gpu_names) or 'no'} GPUs, {wanted} are needed")
    if len(set(report.gpu_names)) > 1:
        found.append(f"its GPUs differ: {', '.join(sorted(set(report.gpu_names)))}")
    for what, free, needed in (
        ("GPU memory", report.smallest_gpu_free_bytes, needs.gpu_memory_bytes),
        ("host memory", report.memory_available_bytes, needs.host_memory_bytes),
        (str(SHARED_MEMORY), report.shared_memory_free_bytes, _LEAST_SHARED_MEMORY_BYTES),
        ("disk of the run", report.disk_free_bytes, needs.disk_bytes),
    ):
        if free is not None and free < needed:
            found.append(f"{what}: {format_bytes(free)} free, {format_bytes(needed)} needed")
    found += [
        f"{path} {'is not there' if value == MISSING else value}"
        for path, value in report.hashes.items()
        if value == MISSING or value.startswith("unreadable")
    ]
    if needs.run_parent is not None and report.disk_free_bytes is None:
        found.append(f"{needs.run_parent} is not there")
    if node.skew_seconds is not None and abs(node.skew_seconds) > _MAX_SKEW_SECONDS:
        found.append(f"its clock is {node.skew_seconds:+.1f} s off")
    if is_first and report.listener is not None:
        found.append(report.listener)
    if report.open_files < _FEW_OPEN_FILES:
        found.append(f"ulimit -n is {report.open_files}, {_FEW_OPEN_FILES} are needed")
    return found


def _differences(report: NodeReport, usual: Mapping[str, str | None]) -> list[str]:
    """Return in what a node differs from most nodes."""
    found = []
    for name, own in _comparable(report).items():
        if own != usual[name] and name in report.hashes:
            found.append(f"{name} has other content than on most nodes")
        elif own != usual[name]:
            found.append(f"{name} is {own}, {usual[name]} on most nodes")
    return found


def _usual(reports: Sequence[NodeReport]) -> dict[str, str | None]:
    """Return what most nodes have, by name."""
    values: dict[str, Counter[str | None]] = {}
    for report in reports:
        for name, value in _comparable(report).items():
            values.setdefault(name, Counter())[value] += 1
    return {name: counts.most_common(1)[0][0] for name, counts in values.items()}


def _comparable(report: NodeReport) -> dict[str, str | None]:
    """Return what must be the same on all nodes, by name."""
    # Those that are missing are a node's own problem.
    hashes = {path: value for path, value in report.hashes.items() if value != MISSING}
    gpus = ", ".join(report.gpu_names) or "none"
    locked = report.locked_memory_bytes
    return {
        "GPUs": gpus,
        "driver": report.driver,
        "CUDA": report.cuda,
        # What InfiniBand and offload to NVMe pin; a node with less fails in mid-run.
        "ulimit -l": "unlimited" if locked is None else format_bytes(locked),
        **report.versions,
        **hashes,
    }


def _with_rates(
    made: Preflight, values: Sequence[dict[str, Any]], answers: Sequence[Answer]
) -> Preflight:
    value = next((item for item in values if "gemm_tflop_per_s" in item), None)
    if value is not None:
        return replace(made, rates=value)
    said = [f"{answer.host}: {answer.problem}" for answer in answers if answer.problem]
    return replace(
        made, rates_problem=f"the all-reduce failed; {'; '.join(said[:4]) or 'no rank said why'}"
    )


def _report_args(needs: Needs, port: int) -> list[str]:
    args = ["--port", str(port)]
    args += ["--run-parent", str(needs.run_parent)] if needs.run_parent else []
    return [*args, *(word for path in needs.paths for word in ("--path", str(path)))]


def _fabric_args(master: str, port: int, ranks_per_node: int) -> list[str]:
    return [
        *("--ranks-per-node", str(ranks_per_node), "--master-addr", master),
        *("--master-port", str(port)),
    ]


def _report_json(report: NodeReport) -> dict[str, Any]:
    return {
        "gpus": list(report.gpu_names),
        "gpu_free_bytes": report.smallest_gpu_free_bytes,
        "driver": report.driver,
        "cuda": report.cuda,
        "versions": report.versions,
        "memory_available_bytes": report.memory_available_bytes,
        "shared_memory_free_bytes": report.shared_memory_free_bytes,
        "disk_free_bytes": report.disk_free_bytes,
        "hashes": report.hashes,
    }
