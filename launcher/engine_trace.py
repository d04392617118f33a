"""``zerofit trace``: the real DeepSpeed engine on this processor, beside the closed form."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from launcher.dispatch.worker_command import run_worker
from launcher.planning.wording import label
from launcher.predict.memory import estimate_memory
from launcher.prepare import Prepared
from launcher.units import format_bytes
from launcher.worker.trace import TraceRequest, request_to_json
from launcher.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineComparison:
    """What the engine held in each phase, and what the closed form says of it."""

    title: str
    traced: dict[str, Any]
    predicted_bytes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the trace with the prediction beside it."""
        return {"predicted": self.predicted_bytes, "traced": self.traced}


def trace_engine_of(prepared: Prepared, *, rank: int, scale: int) -> EngineComparison:
    """Run the plan's strategy in the engine as one rank of the planned job.

    Args:
        prepared: any plan, fitting or not.
        rank: which of the plan's ranks.
        scale: by how much widths are divided; bytes are scaled back by its square.

    Raises:
        LauncherError: the engine cannot be traced with this model or strategy.
    """
    plan = prepared.plan
    workload = traced_workload(plan.workload, scale=scale)
    request = TraceRequest(
        hf_config=prepared.model_config,
        workload=workload,
        strategy=plan.strategy,
        world_size=plan.cluster.world_size,
        rank=rank,
        scale=scale,
        raw_deepspeed=prepared.recipe.deepspeed,
    )
    with tempfile.TemporaryDirectory(prefix="zerofit-trace-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request_to_json(request)) + "\n", encoding="utf-8")
        traced = run_worker("launcher.worker.trace", [str(path)])
    memory = estimate_memory(workload, plan.strategy, plan.cluster)
    return EngineComparison(
        title=f"{workload.model.name}, {label(plan.strategy)}, {workload.max_seq_len:,} tokens, "
        f"rank {rank} of {plan.cluster.world_size}",
        traced=traced,
        predicted_bytes={phase.phase: phase.allocated_bytes for phase in memory.phases},
    )


def traced_workload(workload: Workload, *, scale: int) -> Workload:
    """Return the workload with a length that the scale divides: the next longer one."""
    return replace(workload, max_seq_len=-(-workload.max_seq_len // scale) * scale)


def render_comparison(comparison: EngineComparison) -> Table:
    """Return a table of the phases, with the error of the closed form."""
    table = Table(title=comparison.title, title_justify="left")
    for name in ("phase", "closed form", "engine", "error"):
        table.add_column(name, justify="left" if name == "phase" else "right", no_wrap=True)
    for phase, traced_bytes in comparison.traced["phases"].items():
        predicted_bytes = comparison.predicted_bytes[phase]
        error = (predicted_bytes - traced_bytes) / traced_bytes
        table.add_row(
            phase, format_bytes(predicted_bytes), format_bytes(traced_bytes), f"{error:+.1%}"
        )
    table.caption = "the engine runs on the processor: no cuBLAS workspace, no streams"
    table.caption_justify = "left"
    return table
