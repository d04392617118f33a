"""What ZeRO-3 costs once, when it has seen all modules run."""

from __future__ import annotations

from launcher.predict.time_calibration import TimeCalibration
from launcher.predict.weight_totals import weight_totals
from launcher.strategy import Method, Strategy
from launcher.workload import Workload


def start_up_seconds(
    workload: Workload,
    strategy: Strategy,
    calibration: TimeCalibration,
    *,
    module_visits: float,
    num_passes: int,
) -> float:
    """Return what one of the first steps takes more than those that follow; 0 below ZeRO-3.

    Once it knows the order of the modules, DeepSpeed asks at each of them, for the first time,
    which parameters to let go: it looks through the modules that follow until they own
    ``stage3_max_reuse_distance`` elements together, and remembers the answer.

    Args:
        workload: the model; packed 4-bit weights count as the numbers that they fill.
        strategy: gives the reuse distance.
        calibration: the seconds of a look at one module.
        module_visits: calls of modules in one micro-step, over all passes.
        num_passes: 2, or 3 when the forward is recomputed; each meets all elements.

    Source:
        DeepSpeed 0.19.8 ``zero/partitioned_param_coordinator.py:__params_to_release`` and its
        ``lru_cache``. Elements are taken to be spread evenly over the modules.
    """
    if strategy.zero_stage != 3:
        return 0.0
    totals = weight_totals(workload)
    elements: float = totals.num_params
    if workload.method is not Method.full:
        elements += totals.num_trainable_params
    if totals.num_quantized_params:
        packing = 2 * workload.precision.bytes_per_element
        elements -= totals.num_quantized_params * (1 - 1 / packing)
    reach = strategy.zero.stage3_max_reuse_distance * module_visits / (num_passes * elements)
    reach = min(reach, module_visits)
    # The last ones have fewer modules than that before them.
    looks = reach * module_visits - reach**2 / 2
    return calibration.reuse_search_seconds * looks
