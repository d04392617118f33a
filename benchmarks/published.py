"""Predict the configurations of published.yaml and lay them beside the published figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.hardware import default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import ModelSpec, spec_from_config
from launcher.predict.memory import MemoryEstimate, Phase, estimate_memory
from launcher.strategy import (
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Precision,
    Strategy,
    ZeroKnobs,
)
from launcher.units import GB, GIB
from launcher.workload import LoraSpec, QuantizationSpec, Workload

PUBLISHED = Path(__file__).with_name("published.yaml")
TRAINING: tuple[Phase, ...] = ("forward", "loss", "backward", "step")
# KAITO's fp32 and 16-bit figures both exceed 4 and 2 B per parameter by this: the context.
IDLE_CONTEXT_BYTES = 447_000_000


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """One published figure and its prediction, in the source's unit."""

    name: str
    predicted: float
    published: float | None


@dataclass(frozen=True, kw_only=True)
class AnchorSet:
    """The figures of one source."""

    title: str
    assumed: str
    unit: str
    anchors: tuple[Anchor, ...]


def read_published(path: Path = PUBLISHED) -> Iterator[AnchorSet]:
    """Yield every set of published figures with today's predictions."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    configs = content["configs"]
    for group in content["sets"]:
        unit = {"GB": GB, "GiB": GIB}[group["unit"]]
        anchors = tuple(
            Anchor(
                name=row["name"],
                predicted=_predicted({**group, **row}, unit=unit, configs=configs),
                published=row["published"],
            )
            for row in ({**group["base"], **row} for row in group["rows"])
        )
        yield AnchorSet(
            title=group["title"], assumed=group["assumed"], unit=group["unit"], anchors=anchors
        )


def _predicted(row: Mapping[str, Any], *, unit: int, configs: Mapping[str, Any]) -> float:
    if row["quantity"] == "tokens_at_80_gb":
        return _tokens_at(80 * GB, row, configs=configs)
    found = _quantity(row["quantity"], _estimate(row, configs=configs))
    if "minus" in row:
        other = _estimate({**row, **row["minus"]}, configs=configs)
        found -= _quantity(row["quantity"], other)
    return found * (row["gpus"] if row.get("per") == "gpus" else 1) / unit


def _tokens_at(limit: int, row: Mapping[str, Any], *, configs: Mapping[str, Any]) -> float:
    """Return the sequence length at which the device's memory passes ``limit`` bytes."""
    low, high = 1, 131_072
    while high - low > 1:
        middle = (low + high) // 2
        used = _estimate({**row, "tokens": middle}, configs=configs).device_used_bytes
        low, high = (middle, high) if used <= limit else (low, middle)
    return high


def _quantity(name: str, estimate: MemoryEstimate) -> float:
    if name == "reserved":
        return estimate.peak_reserved_bytes
    if name == "device":
        return estimate.device_used_bytes
    if name == "loaded":
        loaded = dict(estimate.phase("load").components)
        loaded.pop("adapter weights", None)
        return sum(loaded.values()) + IDLE_CONTEXT_BYTES
    # What a loss or checkpointing saves shows before the optimizer step.
    phases = TRAINING[:3] if name == "step_of_loss" else TRAINING
    return max(estimate.phase(phase).allocated_bytes for phase in phases)


def _estimate(row: Mapping[str, Any], *, configs: Mapping[str, Any]) -> MemoryEstimate:
    cluster = default_cluster(find_gpu(row["gpu"]), gpus_per_node=row.get("gpus", 1))
    strategy = Strategy(
        zero_stage=row["zero_stage"],
        offload_optimizer=Offload(row.get("offload_optimizer", "none")),
        gradient_checkpointing=Checkpointing(row.get("gradient_checkpointing", "none")),
        attention=Attention(row.get("attention", "sdpa")),
        loss=Loss(row.get("loss", "full")),
        micro_batch_size_per_gpu=row.get("micro_batch_size_per_gpu", 1),
        gradient_accumulation_steps=row.get("gradient_accumulation_steps", 1),
        # Their frameworks do not have DeepSpeed's 1 GB buckets: sized as transformers' "auto".
        zero=ZeroKnobs(**{"reduce_bucket_size": 16_777_216, **row.get("zero", {})}),
    )
    lora = dict(row.get("lora", {}))
    if "target_modules" in lora:
        lora["target_modules"] = tuple(lora["target_modules"])
    workload = Workload(
        model=_model(row, configs=configs),
        method=Method(row["method"]),
        max_seq_len=row["tokens"],
        global_batch_size=strategy.micro_batch_size_per_gpu
        * strategy.gradient_accumulation_steps
        * row.get("gpus", 1),
        precision=Precision(row.get("precision", "bf16")),
        lora=LoraSpec(**lora),
        quantization=QuantizationSpec(**row.get("quantization", {})),
    )
    return estimate_memory(workload, strategy, cluster)


def _model(row: Mapping[str, Any], *, configs: Mapping[str, Any]) -> ModelSpec:
    if "config" in row:
        return spec_from_config(configs[row["config"]], name=row["config"])
    return spec_from_config(load_catalogue_entry(row["model"]).config, name=row["model"])
