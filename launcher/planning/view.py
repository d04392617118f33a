"""A plan as tables for the terminal; built here, printed by the command line."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.planning.explain import label
from launcher.planning.plan import Plan
from launcher.units import format_count, format_gib, format_seconds
from launcher.workload import Workload

SHOWN_REJECTIONS = 8


def render_plan(plan: Plan, *, show_all: bool = False) -> RenderableType:
    """Return headline, choices, memory by phase, and what was not chosen.

    Args:
        plan: what to show.
        show_all: list every rejected kind of strategy instead of the nearest few.
    """
    parts: list[RenderableType] = [Text(_headline(plan), style="bold"), _choices(plan)]
    parts += [_memory(plan), Text(_totals(plan)), _rejections(plan, show_all=show_all)]
    if plan.suggestions:
        lines = "\n".join(f"  - {suggestion}" for suggestion in plan.suggestions)
        parts.append(Text(f"What would fit:\n{lines}", style="bold"))
    return Group(*parts)


def _headline(plan: Plan) -> str:
    cluster = plan.cluster
    where = f"{cluster.world_size} x {cluster.gpu.name}"
    if cluster.num_nodes > 1:
        where = f"{cluster.num_nodes} nodes x {cluster.gpus_per_node} {cluster.gpu.name}"
    task = describe(plan.workload)
    if plan.fits:
        return f"{task} on {where}: {label(plan.strategy)}"
    return f"{task} does not fit on {where}; the most frugal strategy is {label(plan.strategy)}"


def describe(workload: Workload) -> str:
    """Return the workload in a few words: ``llama2-7b LoRA (33.6M of 6.74B parameters)``."""
    trained = format_count(workload.num_trainable_params)
    model = workload.model
    return (
        f"{model.name}, {workload.method.value} ({trained} of {format_count(model.num_params)} "
        f"parameters trained), {workload.max_seq_len:,} tokens"
    )


def _choices(plan: Plan) -> Table:
    table = Table(title="What was chosen and why", title_justify="left", show_lines=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", no_wrap=True, style="bold")
    table.add_column("why")
    for decision in plan.decisions:
        table.add_row(decision.field, decision.value, decision.reason)
    return table


def _memory(plan: Plan) -> Table:
    table = Table(title="Predicted memory of the fullest rank", title_justify="left")
    table.add_column("phase", no_wrap=True)
    table.add_column("allocated", justify="right", no_wrap=True)
    table.add_column("largest parts at the fullest moment")
    fullest = plan.memory.fullest
    for phase in plan.memory.phases:
        largest = sorted(phase.components.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{name} {format_gib(size)}" for name, size in largest if size)
        style = "bold" if phase is fullest else None
        table.add_row(phase.phase, format_gib(phase.allocated_bytes), parts, style=style)
    return table


def _totals(plan: Plan) -> str:
    return "\n".join(_total_lines(plan)) + "\n"


def _total_lines(plan: Plan) -> Iterator[str]:
    memory, time, cluster = plan.memory, plan.time, plan.cluster
    yield (
        f"Per GPU: {format_gib(memory.peak_allocated_bytes)} allocated at most, "
        f"{format_gib(memory.peak_reserved_bytes)} reserved, "
        f"{format_gib(memory.device_used_bytes)} in use on the device, of "
        f"{format_gib(plan.limit_bytes)} (after {format_gib(plan.safety_margin_bytes)} of margin)"
    )
    line = f"Per node: {format_gib(memory.host_bytes_per_node)} of host memory"
    if memory.nvme_bytes_per_node:
        line += f", {format_gib(memory.nvme_bytes_per_node)} on NVMe"
    yield f"{line}; one checkpoint takes {format_gib(memory.checkpoint_bytes)} of disk"
    yield (
        f"Time: {format_seconds(time.step_seconds)} per optimizer step, "
        f"{time.tokens_per_second_per_gpu:,.0f} tokens/s per GPU"
        + (f", MFU {time.mfu:.0%}" if cluster.gpu.device_type == "cuda" else "")
    )
    yield f"Bound by: {time.bound_by}"


def _rejections(plan: Plan, *, show_all: bool) -> Table:
    table = Table(title="What was not chosen", title_justify="left")
    table.add_column("strategy")
    table.add_column("why not")
    shown = plan.rejected if show_all else plan.rejected[:SHOWN_REJECTIONS]
    for rejected in shown:
        table.add_row(label(rejected.strategy), rejected.reason)
    if hidden := len(plan.rejected) - len(shown):
        table.caption = f"and {hidden} more kinds: --all shows them"
        table.caption_justify = "left"
    return table
