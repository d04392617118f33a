"""Predict the configurations of published.yaml and lay them beside the published figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import load_replay
import yaml

from launcher.hardware import ClusterSpec, default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import ModelSpec, spec_from_config
from launcher.predict.activations import timeline
from launcher.predict.allocator import outside_bytes
from launcher.predict.calibration import CALIBRATION
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
    open: str
    """What the source leaves open and how much it is worth; empty where nothing is."""
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
            title=group["title"],
            assumed=group["assumed"],
            open=group.get("open", ""),
            unit=group["unit"],
            anchors=anchors,
        )


def _predicted(row: Mapping[str, Any], *, unit: int, configs: Mapping[str, Any]) -> float:
    if row["quantity"] == "tokens_at_device_limit":
        return _tokens_at_limit(row, configs=configs)
    if row["quantity"] == "loaded":
        return _loaded_bytes(row, configs=configs) / unit
    found = _quantity(row, configs=configs)
    if "minus" in row:
        found -= _quantity({**row, **row["minus"]}, configs=configs)
    return found * (row["gpus"] if row.get("per") == "gpus" else 1) / unit


def _tokens_at_limit(row: Mapping[str, Any], *, configs: Mapping[str, Any]) -> float:
    """Return the first sequence length that the GPU's usable memory does not hold."""
    limit = find_gpu(row["gpu"]).memory_bytes
    low, high = 1, 131_072
    while high - low > 1:
        middle = (low + high) // 2
        used = _quantity({**row, "tokens": middle, "quantity": "device"}, configs=configs)
        low, high = (middle, high) if used <= limit else (low, middle)
    return high


def _loaded_bytes(row: Mapping[str, Any], *, configs: Mapping[str, Any]) -> float:
    """Return what nvidia-smi shows while weights are loaded one by one."""
    kind = row.get("quantization", {}).get("kind", "nf4") if row["method"] == "qlora" else None
    reserved = load_replay.peak_reserved_bytes(
        _model(row, configs=configs),
        element_bytes=Precision(row.get("precision", "bf16")).bytes_per_element,
        quantization=kind,
    )
    return reserved + IDLE_CONTEXT_BYTES


def _quantity(row: Mapping[str, Any], *, configs: Mapping[str, Any]) -> float:
    """Return one quantity in bytes, with what the row says of a framework other than ours."""
    workload, strategy, cluster = _configuration(row, configs=configs)
    estimate = estimate_memory(workload, strategy, cluster)
    found = _plain_quantity(row["quantity"], estimate)
    tokens = strategy.micro_batch_size_per_gpu * workload.max_seq_len
    if "bytes_per_logit" in row:
        # Ours at its fullest: three fp32 tensors.
        less = (12 - row["bytes_per_logit"]) * tokens * workload.model.vocab_size
        found -= _lowered(estimate, {"loss": less})
    if row.get("adapters") == "fp32":
        wide, ours = (
            max(
                moment.total_bytes
                for moment in timeline(
                    workload, strategy, cluster.gpu, adapter_bytes=width
                ).backward
            )
            for width in (4, workload.precision.bytes_per_element)
        )
        found += wide - ours
    if row.get("load") == "partitioned":
        outside = {phase.phase: phase.allocated_bytes for phase in estimate.phases[:2]}
        found -= _lowered(estimate, outside)
    if row["quantity"] == "device" and row.get("framework") == "plain":
        # One process without DeepSpeed makes no NCCL communicator.
        beyond = outside_bytes(
            cluster.gpu, CALIBRATION, zero_stage=strategy.zero_stage, world_size=cluster.world_size
        )
        found -= beyond - cluster.gpu.context_bytes
    return found + GB * sum(row.get("plus", {}).values())


def _lowered(estimate: MemoryEstimate, less: Mapping[Phase, float]) -> float:
    """Return by how much the peak falls if these phases need so many bytes less."""
    lower = max(
        phase.allocated_bytes - less.get(phase.phase, 0)
        for phase in estimate.phases
        if phase.phase != "eval"
    )
    return estimate.peak_allocated_bytes - lower


def _plain_quantity(name: str, estimate: MemoryEstimate) -> float:
    if name == "reserved":
        return estimate.peak_reserved_bytes
    if name == "device":
        return estimate.device_used_bytes
    # What a loss or checkpointing saves shows before the optimizer step.
    phases = TRAINING[:3] if name == "step_of_loss" else TRAINING
    return max(estimate.phase(phase).allocated_bytes for phase in phases)


def _configuration(
    row: Mapping[str, Any], *, configs: Mapping[str, Any]
) -> tuple[Workload, Strategy, ClusterSpec]:
    cluster = default_cluster(find_gpu(row["gpu"]), gpus_per_node=row.get("gpus", 1))
    strategy = Strategy(
        zero_stage=row["zero_stage"],
        offload_optimizer=Offload(row.get("offload_optimizer", "none")),
        gradient_checkpointing=Checkpointing(row.get("gradient_checkpointing", "none")),
        attention=Attention(row.get("attention", "sdpa")),
        loss=Loss(row.get("loss", "full")),
        micro_batch_size_per_gpu=row.get("micro_batch_size_per_gpu", 1),
        gradient_accumulation_steps=row.get("gradient_accumulation_steps", 1),
        expandable_segments=row.get("expandable_segments", True),
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
    return workload, strategy, cluster


def _model(row: Mapping[str, Any], *, configs: Mapping[str, Any]) -> ModelSpec:
    if "config" in row:
        return spec_from_config(configs[row["config"]], name=row["config"])
    return spec_from_config(load_catalogue_entry(row["model"]).config, name=row["model"])
