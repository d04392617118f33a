"""What ZeRO-3's early step takes more, against measured runs and by hand."""

from __future__ import annotations

import pytest

from launcher.hardware import default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import spec_from_config
from launcher.predict.start_up import start_up_seconds
from launcher.predict.step_time import estimate_time
from launcher.predict.time_calibration import TimeCalibration
from launcher.strategy import Checkpointing, Method, Strategy, ZeroKnobs
from launcher.workload import LoraSpec, Workload

ONE_SECOND_A_LOOK = TimeCalibration(reuse_search_seconds=1.0)


def job(name: str, method: Method, lora: LoraSpec | None = None) -> Workload:
    return Workload(
        model=spec_from_config(load_catalogue_entry(name).config, name=name),
        method=method,
        max_seq_len=2048,
        global_batch_size=2,
        lora=lora or LoraSpec(r=16),
    )


def looks(reuse_distance: int, zero_stage: int = 3) -> float:
    strategy = Strategy(
        zero_stage=zero_stage,  # type: ignore[arg-type]
        zero=ZeroKnobs(stage3_max_reuse_distance=reuse_distance),
    )
    return start_up_seconds(
        job("llama2-7b", Method.full),
        strategy,
        ONE_SECOND_A_LOOK,
        module_visits=1000,
        num_passes=2,
    )


def test_a_run_that_keeps_nothing_looks_for_nothing() -> None:
    assert looks(0) == 0


def test_an_unlimited_distance_makes_each_module_look_through_all_that_follow() -> None:
    assert looks(10**12) == pytest.approx(1000 * 1000 / 2)


def test_a_distance_ends_each_search_where_its_elements_are_met() -> None:
    # A tenth of the two passes' elements is a tenth of the modules: 100 looks each, and fewer for
    # the last 100.
    assert looks(2 * 6_738_415_616 // 10) == pytest.approx(900 * 100 + 100 * 100 / 2)


def test_below_zero3_no_step_is_longer() -> None:
    assert looks(10**9, zero_stage=2) == 0


# all_step_seconds of benchmarks/results: the second step less the median of those after it, on
# two H200 or one H100; where the host's speed was measured, brought to that of the fitted runs.
@pytest.mark.parametrize(
    ("name", "lora", "gc", "seconds"),
    [
        ("smollm2-360m", LoraSpec(r=4, target_modules=("attention",)), True, 34.7 * 46.5 / 57.4),
        ("llama2-7b", LoraSpec(r=16), True, 5.5),  # h200x2; before it blind3_h100
        ("llama3-8b", LoraSpec(r=16), False, 2.7),  # h200x2
        ("smollm2-360m", None, True, 4.8),  # blind_h100
        ("qwen2.5-1.5b", None, True, 1.5),  # blind_h100
    ],
)
def test_the_second_step_is_as_long_as_it_was_measured(
    *, name: str, lora: LoraSpec | None, gc: bool, seconds: float
) -> None:
    strategy = Strategy(
        zero_stage=3,
        gradient_checkpointing=Checkpointing.full if gc else Checkpointing.none,
    )
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    workload = job(name, Method.lora if lora else Method.full, lora)
    estimate = estimate_time(workload, strategy, cluster)
    assert estimate.start_up_seconds == pytest.approx(seconds, rel=0.2)
