"""Advice is what the planner itself says of the changed recipe."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_inputs import phase, rank

from launcher import run_dir as rd
from launcher.failure_kind import FailureKind
from launcher.peaks import peaks_to_json
from launcher.planning.plan import Plan, plan_to_json
from launcher.prepare import prepare
from launcher.recipe import parse_recipe
from launcher.recovery.next_rung import next_rung
from launcher.report.build import build_report
from launcher.report.run_reader import load_run
from launcher.run_advice import LEAST_GAIN, advise
from launcher.units import GIB

DATA_RUN = Path(__file__).parents[1] / "data" / "run"
RECIPE = """
model: {name_or_path: llama2-7b, random_weights: true}
method: lora
max_seq_len: 1024
optim: {global_batch_size: 16, max_steps: 10}
cluster: {gpu: H100-80GB, num_nodes: 1, gpus_per_node: 2}
"""


@functools.cache
def planned(*overrides: str) -> Plan:
    return prepare(parse_recipe(RECIPE, source="test", overrides=overrides), source="test").plan


def run_with(folder: Path, *fixed: str, used_gib: float | None = None, **changes: Any) -> Path:
    """A run of two H100, whose ranks needed what was predicted, or so many GiB."""
    lines = [f"{key}: {value}" for key, value in (item.split("=") for item in fixed)]
    (folder / rd.RECIPE).write_text(RECIPE + f"strategy: {{{', '.join(lines)}}}\n")
    plan = planned(*(f"strategy.{item}" for item in fixed))
    rd.write_json(folder / rd.PLAN, plan_to_json(plan))
    (folder / rd.RANKS).mkdir()
    used = plan.memory.device_used_bytes if used_gib is None else int(used_gib * GIB)
    for number in range(2):
        measured = phase(10, device_used_bytes=used)
        peaks = rank(number, phases={"forward": measured}, **changes)
        rd.write_json(rd.rank_file(folder, number), peaks_to_json(peaks))
    rd.write_status(folder, "finished")
    return folder


def advice_of(folder: Path) -> tuple[str, ...]:
    return advise(folder, build_report(load_run(folder)))


def test_a_fixed_micro_batch_that_is_too_small_is_named_with_what_the_planner_predicts(
    tmp_path: Path,
) -> None:
    folder = run_with(
        tmp_path, "micro_batch_size_per_gpu=1", "zero_stage=3", "offload_optimizer=cpu"
    )
    (advice,) = advice_of(folder)
    now = planned(
        "strategy.micro_batch_size_per_gpu=1",
        "strategy.zero_stage=3",
        "strategy.offload_optimizer=cpu",
    )
    overrides = re.findall(r"strategy\.\w+=\w+", advice)
    then = planned(*overrides)
    assert then.fits
    gain = now.time.step_seconds / then.time.step_seconds
    assert gain > LEAST_GAIN
    assert f"{gain:.1f}x faster" in advice
    assert "free on the fullest rank" in advice


def test_a_run_as_the_planner_chose_it_is_offered_only_a_larger_batch(tmp_path: Path) -> None:
    for line in advice_of(run_with(tmp_path)):
        assert "optim.global_batch_size=" in line
        assert "another training" in line


def test_a_prediction_that_was_too_low_is_not_trusted_with_more(tmp_path: Path) -> None:
    plan = planned("strategy.micro_batch_size_per_gpu=1")
    # Three times what was predicted: by the same factor nothing larger fits in 80 GiB.
    used = min(3 * plan.memory.device_used_bytes / GIB, 70.0)
    folder = run_with(tmp_path, "micro_batch_size_per_gpu=1", used_gib=used)
    for line in advice_of(folder):
        size = float(re.search(r"\(([\d.]+) GiB of", line)[1])  # type: ignore[index]
        assert size * used * GIB / plan.memory.device_used_bytes <= plan.limit_bytes / GIB


def data_of(folder: Path, *, max_seq_len: int, percentile_99: int, mean: float) -> None:
    """Put a run's data beside it, of 1,000 records."""
    summary = json.loads((DATA_RUN / "data" / "summary.json").read_text())
    summary["max_seq_len"] = max_seq_len
    summary["train"]["whole_length_percentiles"] |= {"99": percentile_99, "100": max_seq_len}
    summary["train"]["mean_sequence_tokens"] = mean
    (folder / "data").mkdir()
    (folder / "data" / "summary.json").write_text(json.dumps(summary))


def test_records_much_shorter_than_planned_for_are_answered_with_a_length_and_with_packing(
    tmp_path: Path,
) -> None:
    # The planner chooses micro-batch 8 of 16 samples on two GPUs; fixed to 1, more go in at once.
    folder = run_with(tmp_path, "micro_batch_size_per_gpu=1")
    data_of(folder, max_seq_len=1024, percentile_99=300, mean=100.0)
    cut, pack = advice_of(folder)[-2:]
    assert "99 % of the records have at most 300 tokens, and memory is kept for 1,024" in cut
    assert "max_seq_len=384 cuts the rest" in cut
    now = planned("strategy.micro_batch_size_per_gpu=1", "max_seq_len=100")
    micro = re.search(r"micro-batch (\d+) fits", cut)[1]  # type: ignore[index]
    then = planned(f"strategy.micro_batch_size_per_gpu={micro}", "max_seq_len=100")
    gain = float(re.search(r"([\d.]+)x faster", cut)[1])  # type: ignore[index]
    assert gain == pytest.approx(now.time.step_seconds / then.time.step_seconds, rel=0.05)
    assert "Sequences have 100 tokens on average: packed into 1,024 (data.packing=true)" in pack
    assert "a step then has 10.2x as many tokens" in pack
    assert float(re.search(r"([\d.]+)x faster", pack)[1]) > LEAST_GAIN  # type: ignore[index]


def test_records_of_about_the_planned_length_are_left_alone(tmp_path: Path) -> None:
    folder = run_with(tmp_path)
    data_of(folder, max_seq_len=1024, percentile_99=900, mean=800.0)
    assert not [line for line in advice_of(folder) if "tokens" in line]


def test_out_of_memory_is_answered_with_the_plans_next_rung(tmp_path: Path) -> None:
    folder = run_with(tmp_path, state="out_of_memory")
    plan = json.loads((folder / rd.PLAN).read_text())
    (advice,) = advice_of(folder)
    if plan["ladder"]:
        assert "next more frugal strategy" in advice
        for override in re.findall(r"strategy\.(\w+)=(\w+)", advice):
            assert str(plan["ladder"][0]["strategy"][override[0]]).lower() == override[1]
    else:
        assert "no more frugal strategy" in advice


def test_out_of_memory_with_all_keys_fixed_names_the_plan_that_recovery_would_take(
    tmp_path: Path,
) -> None:
    fixed = (
        "zero_stage=2", "micro_batch_size_per_gpu=8", "gradient_checkpointing=none",
        "attention=eager", "loss=full", "optimizer=adamw", "offload_optimizer=none",
        "offload_param=none", "grad_accum_dtype=fp32", "sequence_parallel_size=1",
    )  # fmt: skip
    folder = run_with(tmp_path, *fixed, state="out_of_memory")
    assert json.loads((folder / rd.PLAN).read_text())["ladder"] == []
    (advice,) = advice_of(folder)
    assert "no more frugal strategy fits within what the recipe fixes" in advice
    recipe = parse_recipe((folder / rd.RECIPE).read_text(), source="test")
    before = prepare(recipe, source="test")
    taken = next_rung(folder, before, kind=FailureKind.gpu_oom, phase=None, num_earlier=0)
    overrides = dict(re.findall(r"strategy\.(\w+)=(\w+)", advice))
    follows = "gradient_accumulation_steps"  # from the micro-batch: no key of a recipe
    changed = {key: str(after) for key, (_, after) in taken.changes.items() if key != follows}
    assert overrides == changed
    assert taken.prepared.plan.fits


def test_a_full_device_is_told_to_save(tmp_path: Path) -> None:
    plan = planned("strategy.micro_batch_size_per_gpu=8")
    total = (plan.limit_bytes + plan.safety_margin_bytes) / GIB
    folder = run_with(tmp_path, "micro_batch_size_per_gpu=8", used_gib=total - 0.25)
    if plan.ladder:
        assert advice_of(folder)[0].startswith("Only 256.00 MiB were free on the fullest rank")


@pytest.mark.parametrize("name", [rd.PLAN, rd.RECIPE])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 1}', "model: 5"])
def test_files_that_cannot_be_used_cost_the_advice_and_not_the_report(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = run_with(tmp_path)
    (folder / name).write_text(content)
    advice = advice_of(folder)
    assert len(advice) <= 1
    assert all(line.startswith("No advice: ") for line in advice)
