"""Constants of torch, CUDA and the host that a site may have measured for itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.hardware import ClusterSpec, GpuSpec, SiteConstants
from launcher.predict.calibration import CALIBRATION, Calibration
from launcher.predict.time_calibration import (
    REFERENCE_AUTOGRAD_OP_SECONDS,
    TimeCalibration,
)
from launcher.units import format_bytes

CONTEXT = "context_bytes"
_MEMORY = (
    "nccl_bytes",
    "all_reduce_bytes",
    "block_slack_bytes",
    "transient_fragmentation",
    "transient_fragmentation_fixed_segments",
    "process_host_bytes",
    "bitsandbytes_host_bytes",
)
_TIME = ("host_op_seconds", "zero3_module_seconds", "gradient_hook_seconds", "trainer_step_seconds")
_KERNELS = ("matmul_fraction", "flash_fraction", "masked_fraction", "memory_fraction")
NAMES = (CONTEXT, *_MEMORY, *_TIME, *_KERNELS)
"""Those that can differ between sites; ``calibration`` and ``time_calibration`` say what each is.
``context_bytes`` is the GPU's own: what a CUDA context and its kernels take."""

_DEFAULT_TIME = TimeCalibration()


def default_constants(gpu: GpuSpec) -> dict[str, float]:
    """Return the value of every constant on this GPU where no site has fitted one."""
    kernels = _DEFAULT_TIME.efficiency_of(gpu)
    return {
        CONTEXT: gpu.context_bytes,
        **{name: getattr(CALIBRATION, name) for name in _MEMORY},
        **{name: getattr(_DEFAULT_TIME, name) for name in _TIME},
        **{name: getattr(kernels, name) for name in _KERNELS},
    }


def constant_words(name: str, value: float) -> str:
    """Return a constant's value with its unit, for people."""
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_seconds"):
        return f"{value * 1e6:.3g} µs" if value < 1e-3 else f"{value * 1e3:.3g} ms"
    return f"{value:.3g}"


def with_site_constants(cluster: ClusterSpec, site: SiteConstants) -> ClusterSpec:
    """Return the cluster as a site has measured it; names must be of ``NAMES``."""
    context_bytes = round(dict(site.values).get(CONTEXT, cluster.gpu.context_bytes))
    return replace(cluster, gpu=replace(cluster.gpu, context_bytes=context_bytes), site=site)


def memory_constants(cluster: ClusterSpec) -> Calibration:
    """Return the constants of the memory model for a cluster."""
    return CALIBRATION if cluster.site is None else _memory(cluster.site)


def time_constants(cluster: ClusterSpec) -> TimeCalibration:
    """Return the constants of the step-time model for a cluster.

    Where the host was measured, its constants follow it; those that a site fitted to its own runs
    stay as they are.
    """
    slowness = host_slowness(cluster)
    if cluster.site is None and slowness is None:
        return _DEFAULT_TIME
    return _time(cluster.site, cluster.gpu, slowness)


def host_slowness(cluster: ClusterSpec) -> float | None:
    """Return how many times the fitted host's seconds this one needs; ``None``: not measured."""
    measured = cluster.host_autograd_op_seconds
    return None if measured is None else measured / REFERENCE_AUTOGRAD_OP_SECONDS


@functools.lru_cache(maxsize=16)
def _memory(site: SiteConstants) -> Calibration:
    # Bytes are whole in every sum.
    found: dict[str, Any] = {
        name: round(value) if name.endswith("_bytes") else value
        for name, value in _of(site, _MEMORY).items()
    }
    return replace(CALIBRATION, **found)


@functools.lru_cache(maxsize=256)
def _time(site: SiteConstants | None, gpu: GpuSpec, slowness: float | None) -> TimeCalibration:
    constants = _DEFAULT_TIME if slowness is None else _DEFAULT_TIME.on_host(slowness)
    if site is None:
        return constants
    kernels = replace(constants.efficiency_of(gpu), **_of(site, _KERNELS))
    return replace(constants, **_of(site, _TIME), efficiency={gpu.name: kernels})


def _of(site: SiteConstants, names: tuple[str, ...]) -> Mapping[str, float]:
    return {name: value for name, value in site.values if name in names}
