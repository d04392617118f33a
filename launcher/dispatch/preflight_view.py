"""All nodes of a preflight side by side, and below the table what is wrong with which."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from launcher.dispatch.preflight import Node, Preflight
from launcher.units import format_bytes

_COLUMNS = (
    *("", "node", "GPUs", "GPU free", "driver, CUDA", "python", "torch", "deepspeed", "NCCL"),
    *("memory", "shm", "disk", "clock"),
)


_MAY_BE_ALIKE = frozenset({"GPUs", "driver, CUDA", "python", "torch", "deepspeed", "NCCL"})


def render_preflight(made: Preflight) -> Group:
    """Return the table for the terminal, with reasons and the measured rates below it.

    What is the same on all nodes is said once below the table, which fits a terminal then.
    """
    rows = [_cells(node) for node in made.nodes]
    values = {
        title: {row[index].plain for row in rows if index < len(row)}
        for index, title in enumerate(_COLUMNS)
    }
    alike = [name for name in _COLUMNS if name in _MAY_BE_ALIKE and len(values[name]) == 1]
    left_out = {*alike, *(title for title in _COLUMNS if values[title] <= {""})}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in _COLUMNS:
        if title not in left_out:
            table.add_column(title, overflow="fold")
    for row in rows:
        cells = zip(_COLUMNS, row, strict=False)
        table.add_row(*(cell for title, cell in cells if title not in left_out))
    lines = [Text()]
    if alike:
        said = "; ".join(f"{name} {next(iter(values[name]))}" for name in alike)
        lines.append(Text(f"on all: {said}"))
    for node in made.nodes:
        name = (f"{node.host.name}: ", "bold red")
        lines += [Text.assemble(name, problem) for problem in node.problems]
        if node.fix:
            lines.append(Text(f"  fix: {node.fix}", style="italic"))
    lines += [Text(line) for line in _rate_lines(made)]
    num_good = len(made.good)
    lines.append(Text(f"{num_good} of {len(made.nodes)} nodes are ready", style="bold"))
    return Group(table, *lines)


def _cells(node: Node) -> list[Text]:
    state = Text("ok", style="green") if node.is_good else Text("fail", style="bold red")
    cells = [state, Text(node.host.name)]
    report = node.report
    if report is None:
        return cells
    gpus = f"{len(report.gpu_names)} x {report.gpu_names[0]}" if report.gpu_names else "none"
    free = report.smallest_gpu_free_bytes
    driver = f"{report.driver}, {report.cuda}" if report.driver else "none"
    disk = report.disk_free_bytes
    skew = "" if node.skew_seconds is None else f"{node.skew_seconds:+.1f} s"
    names = ("python", "torch", "deepspeed", "nccl")
    return [
        *cells,
        Text(gpus),
        Text("" if free is None else format_bytes(free)),
        Text(driver),
        *(Text(report.versions.get(name) or "none") for name in names),
        Text(format_bytes(report.memory_available_bytes)),
        Text(format_bytes(report.shared_memory_free_bytes)),
        Text("" if disk is None else format_bytes(disk)),
        Text(skew),
    ]


def _rate_lines(made: Preflight) -> list[str]:
    if made.rates_problem is not None:
        return [made.rates_problem]
    titles = (
        ("gemm_tflop_per_s", "matrix product, slowest rank", "TFLOP/s"),
        ("host_autograd_op_microseconds", "operation and gradient, slowest rank's host", "µs"),
        ("intra_node_all_reduce_gbit_per_s", "all-reduce inside a node", "Gbit/s"),
        ("inter_node_all_reduce_gbit_per_s", "all-reduce between the nodes", "Gbit/s"),
    )
    return [
        f"{title}: {rate:.3g} {unit}"
        for key, title, unit in titles
        if (rate := made.rates.get(key)) is not None
    ]
