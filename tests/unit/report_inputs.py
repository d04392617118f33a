"""Small hand-made inputs of a report; sizes are round so that results can be checked by hand."""

from __future__ import annotations

from typing import Any

from launcher.peaks import PhasePeaks, RankFailure, RankPeaks
from launcher.units import GIB

PLAN: dict[str, Any] = {
    "schema_version": 1,
    "fits": True,
    "model": {"name": "tiny-llama", "num_params": 1_000_000, "num_trainable_params": 10_000},
    "method": "lora",
    "precision": "bf16",
    "max_seq_len": 512,
    "gpu": "V100-32GB",
    "device_type": "cuda",
    "world_size": 2,
    "strategy": {
        "zero_stage": 2,
        "offload_optimizer": "cpu",
        "offload_param": "none",
        "micro_batch_size_per_gpu": 4,
    },
    "limit_bytes": 9 * GIB,
    "safety_margin_bytes": 1 * GIB,
    "memory": {
        "peak_allocated_bytes": 6 * GIB,
        "peak_reserved_bytes": 7 * GIB,
        "device_used_bytes": 8 * GIB,
        "host_bytes_per_node": 9 * GIB,
        "phases": {
            "init": {
                "allocated_bytes": 2 * GIB,
                "moment": "after loading",
                "components": {"base weights": 2 * GIB},
            },
            "forward": {
                "allocated_bytes": 4 * GIB,
                "moment": "last layer",
                "components": {"base weights": 2 * GIB, "activations": 2 * GIB},
            },
            "backward": {
                "allocated_bytes": 6 * GIB,
                "moment": "first layer",
                "components": {
                    "base weights": 2 * GIB,
                    "activations": 3 * GIB,
                    "gradients": 1 * GIB,
                },
            },
        },
    },
    "time": {
        "step_seconds": 1.5,
        "tokens_per_second_per_gpu": 2000.0,
        "components": {"compute": 1.5},
        "bound_by": "compute",
    },
}


def phase(allocated_gib: float, **changes: Any) -> PhasePeaks:
    """A phase with a gibibyte more reserved than allocated, and another one of context."""
    values: dict[str, Any] = {
        "peak_allocated_bytes": int(allocated_gib * GIB),
        "peak_reserved_bytes": int((allocated_gib + 1) * GIB),
        "device_used_bytes": int((allocated_gib + 2) * GIB),
        "host_rss_bytes": 3 * GIB,
        "seconds": 2.0,
        "count": 4,
    }
    return PhasePeaks(**values | changes)


def rank(number: int, **changes: Any) -> RankPeaks:
    """A rank of two that measured 4 GiB in forward and 5 GiB in backward."""
    values: dict[str, Any] = {
        "rank": number,
        "local_rank": number,
        "world_size": 2,
        "host": "node1",
        "pid": 100 + number,
        "device": "cuda",
        "device_name": "V100",
        "state": "finished",
        "steps_done": 4,
        "phases": {"init": phase(2), "forward": phase(4), "backward": phase(5)},
        "step_seconds": (9.0, 1.0, 3.0, 2.0),
        "tokens_per_step": 4096,
    }
    return RankPeaks(**values | changes)


def failure(kind: str, message: str) -> RankFailure:
    return RankFailure(
        phase="backward",
        type=kind,
        message=message,
        traceback=f"Traceback (most recent call last):\n  File train.py\n{kind}: {message}",
    )


LOG: tuple[dict[str, Any], ...] = (
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 3.0, "learning_rate": 1e-4, "grad_norm": 1.0},
    {"step": 2, "loss": 2.5},
    {"step": 3, "loss": 2.25},
    {"step": 4, "loss": 2.0, "eval_loss": 2.4},
)
RESULTS: dict[str, Any] = {
    "eval_loss_before": 3.0,
    "eval_loss_after": 2.4,
    "sample": {"prompt": "What is X?", "before": "Nothing.", "after": "A letter."},
    "train_loss_first": 3.0,
    "train_loss_last": 2.0,
    "tokens_seen": 32768,
    "train_seconds": 15.0,
}
