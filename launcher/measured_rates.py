"""Rates that ``zerofit doctor`` measured on a cluster, in place of the usual ones of its GPUs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

from launcher.errors import HardwareError
from launcher.hardware import ClusterSpec

SCHEMA = 1
_KEYS = (
    "intra_node_all_reduce_gbit_per_s",
    "inter_node_all_reduce_gbit_per_s",
    "gemm_tflop_per_s",
    "host_autograd_op_microseconds",
)
# Of the datasheet's dense peak, a square product of 8,192 in bf16: 798 of 989 TFLOP/s on an H100,
# 788 on an H200.
_GEMM_FRACTION = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRates:
    """What was measured; ``None`` is what was not.

    The all-reduce rates are bus bandwidths (nccl-tests ``doc/PERFORMANCE.md``): what the slowest
    link carries one way.
    """

    intra_node_bytes_per_s: float | None
    inter_node_bytes_per_s: float | None
    gemm_flops_per_s: float | None
    """Of a large square product, on the slowest rank."""
    host_autograd_op_seconds: float | None
    """Of the slowest rank's host for an operation and its gradient."""


def rates_from_json(text: str, *, source: str) -> MeasuredRates:
    """Read the JSON of ``zerofit doctor``; keys beside the rates are left alone.

    Raises:
        HardwareError: it is not that JSON, a rate is not a number above 0, or there is none.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _unusable(f"this is not JSON: {error}", source) from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else None
        raise _unusable(f"its schema is {found!r}, not {SCHEMA}", source)
    rates: dict[str, float | None] = {}
    for key in _KEYS:
        value = content.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value) and value > 0):
            raise _unusable(f"{key} is {value!r}, it must be null or a number above 0", source)
        rates[key] = value
    if all(value is None for value in rates.values()):
        why = (
            content.get("rates_problem") or "doctor ran with --no-measure, or nodes were not ready"
        )
        raise _unusable(f"it has no rates: {why}", source)
    intra, inter, gemm, host = (rates[key] for key in _KEYS)
    return MeasuredRates(
        intra_node_bytes_per_s=None if intra is None else intra * 1e9 / 8,
        inter_node_bytes_per_s=None if inter is None else inter * 1e9 / 8,
        gemm_flops_per_s=None if gemm is None else gemm * 1e12,
        host_autograd_op_seconds=None if host is None else host / 1e6,
    )


def with_measured_rates(cluster: ClusterSpec, rates: MeasuredRates) -> ClusterSpec:
    """Return the cluster with what was measured in place of what is usual."""
    gpu = cluster.gpu
    if rates.intra_node_bytes_per_s is not None:
        gpu = replace(gpu, peer_link_bytes_per_s=rates.intra_node_bytes_per_s)
    if rates.gemm_flops_per_s is not None:
        gpu = replace(gpu, matmul_flops_per_s=rates.gemm_flops_per_s / _GEMM_FRACTION)
    if rates.inter_node_bytes_per_s is not None:
        cluster = replace(cluster, inter_node_bytes_per_s=rates.inter_node_bytes_per_s)
    cluster = replace(cluster, host_autograd_op_seconds=rates.host_autograd_op_seconds)
    return replace(cluster, gpu=gpu)


def _unusable(problem: str, source: str) -> HardwareError:
    return HardwareError(
        problem, where=source, fix="write it anew: zerofit doctor --hostfile HOSTFILE --output FILE"
    )
