"""Models, clusters and workloads that several tests of the planner use."""

from __future__ import annotations

import functools
from typing import Any

from launcher.hardware import ClusterSpec, cpu_spec, default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import ModelSpec, spec_from_config
from launcher.resolve import default_precision
from launcher.strategy import Method
from launcher.units import GIB
from launcher.workload import Workload


@functools.cache
def model(name: str) -> ModelSpec:
    return spec_from_config(load_catalogue_entry(name).config, name=name)


@functools.cache
def cluster(gpu: str = "A100-80GB", *, gpus: int = 8, nodes: int = 1) -> ClusterSpec:
    return default_cluster(find_gpu(gpu), num_nodes=nodes, gpus_per_node=gpus)


def processors(ranks: int, *, gib: int = 8) -> ClusterSpec:
    """Ranks on the processor of one machine, as the demo has them."""
    return default_cluster(cpu_spec(gib * GIB), gpus_per_node=ranks)


def workload(
    name: str = "llama2-7b",
    *,
    place: ClusterSpec | None = None,
    method: Method = Method.lora,
    tokens: int = 2048,
    batch: int | None = None,
    **changes: Any,
) -> Workload:
    """A workload in the precision that suits the cluster's GPU, one sample per GPU."""
    place = place or cluster()
    values: dict[str, Any] = {
        "model": model(name),
        "method": method,
        "max_seq_len": tokens,
        "global_batch_size": place.world_size if batch is None else batch,
        "precision": default_precision(place.gpu),
    }
    return Workload(**{**values, **changes})
