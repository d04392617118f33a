"""A plan as text and tables for the terminal; built here, printed by the command line."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launcher.hardware import SiteConstants
from launcher.planning.plan import Plan
from launcher.planning.wording import METHOD_NAME, changes, fit_words, label, plain_part, short_size
from launcher.predict.site_constants import constant_words, host_slowness
from launcher.strategy import Method
from launcher.units import GIB, format_count, format_seconds
from launcher.workload import Workload

SHOWN_REJECTIONS = 6
SHOWN_RUNGS = 3
# Smaller parts are left out of the memory table: nobody can do anything about them.
_SMALLEST_PART_FRACTION = 0.02
_SHOWN_START_UP_SECONDS = 1.0

_PHASE_MEANING = {
    "load": "weights arrive",
    "init": "DeepSpeed sets up",
    "forward": "the model predicts",
    "loss": "the prediction is scored",
    "backward": "gradients are computed",
    "step": "the weights change",
    "save": "a checkpoint is written",
    "eval": "held-out data is scored",
}


_TERMS = (
    "Terms: ZeRO-1, 2 and 3 share more and more of what training keeps among the GPUs. "
    "Checkpointing computes layers twice to save memory; a checkpoint is what is saved to disk. A "
    "micro-batch is what a GPU works on at once, an optimizer step one change of the weights."
)


def render_plan(plan: Plan, *, show_all: bool = False) -> RenderableType:
    """Return headline, choices, memory by phase, and what was not chosen.

    Args:
        plan: what to show.
        show_all: list every rejected kind of strategy instead of the nearest few.
    """
    parts: list[RenderableType] = [_headline(plan), _totals(plan)]
    if plan.suggestions:
        parts += [_title("What would fit"), _bullets(plan.suggestions)]
    chosen = "What was chosen, and why" if plan.fits else "What comes closest, and why"
    parts += [_title(chosen), _choices(plan)]
    memory_title = "Memory of the fullest GPU, phase by phase"
    parts += [_title(fit_words(memory_title, plan.cluster.gpu)), _memory(plan)]
    parts += [
        _title("What was not chosen (the same plan, but with …)"),
        _rejections(plan, show_all=show_all),
    ]
    hidden = len(plan.rejected) - SHOWN_REJECTIONS
    if hidden > 0 and not show_all:
        parts.append(Text(f"  and {hidden} more: --all shows them", style="dim"))
    if plan.fits and plan.ladder:
        parts += [
            _title("If memory runs out after all, in this order (the same plan, but with …)"),
            _ladder(plan),
        ]
    parts.append(Text(f"\n{fit_words(_TERMS, plan.cluster.gpu)}", style="dim"))
    return Group(*parts)


def describe(workload: Workload) -> str:
    """Return the workload in a few words: ``llama2-7b, LoRA (40M of 6.74B parameters …)``."""
    model = workload.model
    trained = "all " + format_count(model.num_params) + " parameters trained"
    if workload.method is not Method.full:
        count = format_count(workload.num_trainable_params)
        trained = f"{count} trained parameters beside {format_count(model.num_params)} frozen"
    return (
        f"{model.name}, {METHOD_NAME[workload.method]} ({trained}), {workload.max_seq_len:,} tokens"
    )


def _headline(plan: Plan) -> RenderableType:
    cluster = plan.cluster
    where = f"{cluster.world_size} x {cluster.gpu.name}"
    if cluster.num_nodes > 1:
        where = f"{cluster.num_nodes:,} nodes x {cluster.gpus_per_node} {cluster.gpu.name}"
    chosen = label(plan.strategy)
    notes = []
    if plan.workload.model.traced is not None:
        kind = plan.workload.model.model_type
        notes = [Text(f"{kind} has no formulas here: its layers were built and traced instead")]
    quantized, frozen = plan.workload.num_quantized_params, plan.workload.model.num_params
    if plan.workload.method is Method.qlora and quantized < frozen / 2:
        shares = f"{format_count(quantized)} of {format_count(frozen)} parameters"
        text = f"only {shares} are quantized: linear layers, not embeddings and fused experts"
        notes.append(Text(text, style="bold yellow"))
    if cluster.site is not None:
        notes.append(Text(_calibrated_words(cluster.site)))
    if (slowness := host_slowness(cluster)) is not None:
        text = f"measured by doctor: these hosts need {slowness:.2f} times the usual time"
        notes.append(Text(f"{text} to start an operation on a GPU"))
    if plan.unpredicted_keys:
        keys = ", ".join(plan.unpredicted_keys)
        text = f"no number below follows what these keys do to memory and time: {keys}"
        notes.append(Text(text, style="bold yellow"))
    verdict = f"fits: {chosen}" if plan.fits else f"DOES NOT FIT; closest: {chosen}"
    return Group(
        Text(f"{describe(plan.workload)}, on {where}"),
        *notes,
        Text(verdict, style="bold green" if plan.fits else "bold red"),
        Text(),
    )


def _calibrated_words(site: SiteConstants) -> str:
    names = ", ".join(f"{name} {constant_words(name, value)}" for name, value in site.values)
    return f"calibrated at this site, by {site.num_runs} runs ({site.fitted_at}): {names}"


def _title(text: str) -> RenderableType:
    return Text(f"\n{text}", style="bold")


def _grid(*widths: int | None) -> Table:
    """Return a table without lines whose columns have these widths; ``None`` takes the rest."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for width in widths:
        if width is None:
            table.add_column(ratio=1)
        else:
            table.add_column(min_width=width, no_wrap=True)
    table.expand = True
    return table


def _indented(table: RenderableType) -> RenderableType:
    return Padding(table, (0, 0, 0, 2))


def _totals(plan: Plan) -> RenderableType:
    table = _grid(8, None)
    for name, text in _total_lines(plan):
        table.add_row(Text(name, style="cyan"), text)
    return _indented(table)


def _total_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    memory, time, cluster = plan.memory, plan.time, plan.cluster
    total = plan.limit_bytes + plan.safety_margin_bytes
    is_gpu = cluster.gpu.device_type == "cuda"
    used = (
        f"{short_size(memory.device_used_bytes)} of {short_size(total)} per "
        f"{'GPU' if is_gpu else 'rank'}"
    )
    used += _too_much(memory.device_used_bytes - plan.limit_bytes)
    if is_gpu:
        used += (
            f": tensors take {short_size(memory.peak_allocated_bytes)}, with what torch reserves "
            f"{short_size(memory.peak_reserved_bytes)}"
        )
    margin = "is kept free" if plan.fits else "must stay free"
    used += f"; {short_size(plan.safety_margin_bytes)} {margin}, the largest error measured"
    yield "memory", used
    host = (
        f"{short_size(memory.host_bytes_per_node)} of the {short_size(cluster.host_memory_bytes)} "
        "per node"
    )
    host += _too_much(memory.host_bytes_per_node - cluster.host_memory_bytes)
    if memory.nvme_bytes_per_node:
        host += f", {short_size(memory.nvme_bytes_per_node)} on its NVMe drive"
    written = format_seconds(plan.checkpoint_seconds)
    disk = f"{short_size(memory.checkpoint_bytes)} of disk and about {written} per checkpoint"
    yield "host", f"{host}; {disk}"
    tokens = time.tokens_per_second_per_gpu * cluster.world_size
    speed = f"{format_seconds(time.step_seconds)} per optimizer step, {tokens:,.0f} tokens/s in all"
    if cluster.world_size > 1:
        who = "GPU" if is_gpu else "rank"
        speed += f", {time.tokens_per_second_per_gpu:,.0f} per {who}"
    if is_gpu:
        share = f"{time.mfu:.0%}" if time.mfu >= 0.01 else f"{time.mfu:.1%}"
        speed += f"; {share} of the GPUs' peak is useful work (MFU)"
    if time.start_up_seconds >= _SHOWN_START_UP_SECONDS:
        took = format_seconds(time.start_up_seconds)
        speed += f"; an early one takes {took} more, in which ZeRO-3 learns what to keep"
    yield "speed", speed
    yield "bound by", time.bound_by
    if not plan.fits:
        return
    yield "run", _run_words(plan)
    if cluster.num_nodes > 1:
        yield "nodes", _nodes_words(cluster.num_nodes, plan.speedup_over_one_node)


def _too_much(excess_bytes: int) -> str:
    return f", {short_size(excess_bytes)} too much" if excess_bytes > 0 else ""


def _run_words(plan: Plan) -> str:
    """Return the whole run's time and cost; a million tokens' while its length is unknown."""
    run, price = plan.run, plan.price_per_gpu_hour
    hours = "GPU-hours" if plan.cluster.gpu.device_type == "cuda" else "rank-hours"
    if run is not None:
        cost = "" if run.cost is None else f", which cost {_amount(run.cost)}"
        took = format_seconds(run.seconds)
        return f"{run.num_steps:,} steps in {took}, {_amount(run.gpu_hours)} {hours}{cost}"
    gpu_hours = 1e6 / plan.time.tokens_per_second_per_gpu / 3600
    cost = "" if price is None else f", which cost {_amount(gpu_hours * price)}"
    return (
        f"{_amount(gpu_hours)} {hours} for a million tokens{cost}; for the whole run tokenise the "
        "data first, or set optim.max_steps"
    )


def _amount(value: float) -> str:
    """Return hours or money: two decimals, or two digits where these would be zeros."""
    return f"{value:,.2f}" if value >= 1 else f"{value:.2g}"


def _nodes_words(num_nodes: int, speedup: float | None) -> str:
    if speedup is None:
        return "one node alone is not enough for this"
    if speedup < 1:
        return (
            f"{num_nodes:,} nodes take {1 / speedup:.1f} times as long as one at its best: the "
            "network costs more than their GPUs bring; plan with cluster.num_nodes=1"
        )
    return f"{num_nodes:,} nodes are {speedup:.1f} times as fast as one at its best"


def _bullets(lines: tuple[str, ...]) -> RenderableType:
    table = _grid(1, None)
    for line in lines:
        table.add_row("-", line)
    return _indented(table)


def _choices(plan: Plan) -> RenderableType:
    table = _grid(24, None)
    for decision in plan.decisions:
        name = Text(decision.field, style="cyan")
        text = Text.assemble((decision.value, "bold"), f"  {decision.reason}")
        table.add_row(name, text)
    return _indented(table)


def _memory(plan: Plan) -> RenderableType:
    table = _grid(8, 6, None)
    table.columns[1].justify = "right"
    table.add_row("", "GiB", "largest parts", style="dim")
    fullest = plan.memory.fullest
    for phase in plan.memory.phases:
        smallest = _SMALLEST_PART_FRACTION * phase.allocated_bytes
        largest = sorted(phase.components.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(
            f"{plain_part(name)} {size / GIB:.2f}" for name, size in largest if size > smallest
        )
        table.add_row(
            Text(phase.phase, style="cyan"),
            f"{phase.allocated_bytes / GIB:.2f}",
            f"{_PHASE_MEANING[phase.phase]}: {parts}" + (" <- peak" if phase is fullest else ""),
            style="bold" if phase is fullest else None,
        )
    return _indented(table)


def _rejections(plan: Plan, *, show_all: bool) -> RenderableType:
    table = _grid(1, None)
    for rejected in plan.rejected if show_all else plan.rejected[:SHOWN_REJECTIONS]:
        name = changes(rejected.strategy, plan.strategy)
        text = Text.assemble((f"{name}: ", "cyan"), rejected.reason)
        table.add_row("-", text)
    return _indented(table)


def _ladder(plan: Plan) -> RenderableType:
    table = _grid(1, None)
    for number, rung in enumerate(plan.ladder[:SHOWN_RUNGS], start=1):
        used, pace = (
            short_size(rung.memory.device_used_bytes),
            format_seconds(rung.time.step_seconds),
        )
        name = changes(rung.strategy, plan.strategy)
        text = Text.assemble((f"{name}: ", "cyan"), f"{used}, {pace} per step")
        table.add_row(f"{number}", text)
    return _indented(table)
