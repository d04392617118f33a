from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from data_inputs import data_summary, split_summary
from planning_inputs import cluster, workload

from launcher.data_view import describe_data, draw_lengths, histogram_lines
from launcher.epoch import describe_training, longest_tokens, training_of
from launcher.planning.planner import make_plan
from launcher.predict.step_time import estimate_time
from launcher.recipe_sections import OptimSection, StrategySection
from launcher.units import format_seconds


def test_bars_are_as_long_as_counts_and_what_is_cut_off_is_said() -> None:
    bins = [[1, 10, 0], [11, 20, 80], [21, 30, 40], [31, 40, 1]]
    lines = list(histogram_lines(split_summary(length_bins=bins), max_seq_len=30))
    # 40 characters for the most; empty bins before the first record are left out.
    assert lines == [
        f"  11-20 {'█' * 40} 80",
        f"  21-30 {'█' * 20} 40",
        "  31-40 ▌ 1  cut off",
    ]


def test_bars_of_one_length_and_bars_that_the_limit_divides_are_named_as_such() -> None:
    bins = [[7, 7, 2], [8, 9, 1]]
    lines = list(histogram_lines(split_summary(length_bins=bins), max_seq_len=8))
    assert lines == [f"    7 {'█' * 40} 2", f"  8-9 {'█' * 20} 1  some cut off"]


def test_at_most_twenty_bars_are_drawn() -> None:
    bins = [[i + 1, i + 1, 2] for i in range(39)]
    lines = list(histogram_lines(split_summary(length_bins=bins), max_seq_len=100))
    assert len(lines) == 20
    assert lines[0].endswith(" 4")
    assert lines[-1].endswith(" 2")


@pytest.mark.parametrize("max_seq_len", [1, 128, 5000])
@pytest.mark.parametrize("bins", [[[1, 1, 3]], [[1, 100, 1500], [101, 200, 15]]])
def test_the_picture_is_a_png_whatever_the_lengths(max_seq_len: int, bins: list[list[int]]) -> None:
    png = draw_lengths(split_summary(length_bins=bins), max_seq_len=max_seq_len)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    # Bytes 16 to 24 hold width and height (ISO 15948): 8 x 4 inches at 200 pixels.
    assert struct.unpack(">II", png[16:24]) == (1600, 800)


def test_packed_and_mixed_data_say_so() -> None:
    train = split_summary(num_sequences=240)
    both = (train.sources[0], replace(train.sources[0], path="b.csv", format="alpaca"))
    summary = data_summary(train=replace(train, sources=both), packing=True, format="alpaca, text")
    lines = "\n".join(describe_data(summary))
    # 30,000 tokens in 240 sequences of 128.
    assert "packed into 240 sequences, 97.7 % full of 128 tokens" in lines
    assert "b.csv: 1,515 alpaca records" in lines


def test_the_longest_sequence_may_be_a_held_out_one() -> None:
    held_out = split_summary(longest_sequence_tokens=150)
    assert longest_tokens(data_summary()) == 128
    assert longest_tokens(data_summary(eval=held_out)) == 150


def test_steps_and_time_of_a_training_follow_from_its_sequences() -> None:
    plan = make_plan(workload(batch=16), cluster(), fixed=StrategySection())
    optim = OptimSection(global_batch_size=16, num_train_epochs=3)
    training = training_of(data_summary(), plan, optim)
    # 1,500 sequences, 16 a step: 93.75 steps, so 94 an epoch.
    assert (training.steps_per_epoch, training.num_steps) == (94, 282)
    mean = estimate_time(replace(plan.workload, max_seq_len=20), plan.strategy, plan.cluster)
    assert training.seconds == pytest.approx(282 * mean.step_seconds)
    capped = training_of(data_summary(), plan, replace(optim, max_steps=10))
    assert capped.num_steps == 10
    lines = " ".join(describe_training(training, max_seq_len=2048))
    assert "1,500 examples of 30,000 tokens" in lines
    assert "128 tokens, so the plan is for those and not for max_seq_len 2,048" in lines
    assert "282 steps (3 epochs)" in lines
    assert f"{format_seconds(94 * mean.step_seconds)} an epoch" in lines
