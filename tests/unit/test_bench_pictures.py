"""What a sweep's heat maps and bar charts show."""

from __future__ import annotations

from typing import Any

from launcher.bench.bars import draw_bar_chart, make_bar_charts
from launcher.bench.heat_map import draw_heat_map, make_heat_maps
from launcher.bench.result import Result

GB = 10**9


def result(
    tokens: int,
    stage: int,
    *,
    seconds: float,
    measured_seconds: float | None = None,
    fits: bool = True,
    label: str | None = "lora",
) -> Result:
    """A case on two V100s; not measured is out of memory."""
    content: dict[str, Any] = {
        "case": f"{tokens}-{stage}-{label}",
        "recipe": {
            "model": {"name_or_path": "llama2-7b"},
            "max_seq_len": tokens,
            "cluster": {"gpu": "V100-32GB"},
        },
        "strategy_label": label,
        "state": "finished" if measured_seconds else "out_of_memory",
        "predicted": {
            "fits": fits, "limit_bytes": 32 * GB, "world_size": 2,
            "strategy": {"zero_stage": stage}, "peak_allocated_bytes": 14 * GB,
            "device_used_bytes": 16 * GB, "step_seconds": seconds,
        },
        "measured": [],
    }  # fmt: skip
    if measured_seconds:
        content["measured"] = [
            {
                "peak_allocated_bytes": 14 * GB, "device_used_bytes": 8 * GB,
                "step_seconds": measured_seconds,
            }
        ]  # fmt: skip
    return Result(content=content)


RESULTS = (
    result(256, 1, seconds=0.2, measured_seconds=0.4),
    result(256, 2, seconds=0.3, measured_seconds=0.3),
    result(512, 1, seconds=0.5, fits=False),
    result(512, 2, seconds=0.6),
)


def test_each_cell_has_the_fastest_that_fits_as_predicted_and_as_measured() -> None:
    (heat_map,) = make_heat_maps(RESULTS)
    assert heat_map.where == "2 x V100-32GB"
    assert heat_map.models == ("llama2-7b",)
    assert heat_map.contexts == (256, 512)
    here, longer = ("llama2-7b", 256), ("llama2-7b", 512)
    assert heat_map.predicted[here].text == "ZeRO-1 lora\n16.0 GB\n0.2 s"
    assert heat_map.predicted[here].used_fraction == 0.5
    assert heat_map.measured[here].text == "ZeRO-2 lora\n8.0 GB\n0.3 s"
    assert heat_map.measured[here].used_fraction == 0.25
    assert heat_map.predicted[longer].text.startswith("ZeRO-2")
    assert heat_map.measured[longer].text == "out of memory"


def test_a_long_name_of_a_strategy_stays_within_its_cell() -> None:
    (heat_map,) = make_heat_maps(
        (result(256, 1, seconds=0.2, label="lora, checkpointing to host"),)
    )
    # 19 characters of 7.5 points fit into 1.25 inches.
    text = heat_map.predicted["llama2-7b", 256].text
    assert text.startswith("ZeRO-1 lora,\ncheckpointing to\nhost\n")


def test_cases_written_out_have_no_heat_map() -> None:
    assert make_heat_maps((result(256, 1, seconds=1, label=None),)) == ()


def test_one_length_compares_strategies_by_stage_and_several_lengths_by_strategy() -> None:
    (one_length,) = make_bar_charts(RESULTS[:2])
    assert one_length.groups == ("lora",)
    assert one_length.series == ("ZeRO-1", "ZeRO-2")
    (several,) = make_bar_charts(RESULTS)
    assert several.groups == ("256 tokens", "512 tokens")
    assert several.series == ("ZeRO-1 lora", "ZeRO-2 lora")


def test_cases_written_out_are_a_bar_each() -> None:
    (chart,) = make_bar_charts((result(256, 1, seconds=1, label=None),))
    assert chart.groups == ("256-1-None",)
    assert chart.series == ("",)


def test_a_case_without_a_prediction_is_in_no_picture() -> None:
    refused = Result(content={"case": "a", "state": "refused", "recipe": {}, "failure": "no"})
    assert make_bar_charts((refused,)) == ()
    assert make_heat_maps((refused,)) == ()


def test_the_pictures_are_pngs() -> None:
    (heat_map,), (chart,) = make_heat_maps(RESULTS), make_bar_charts(RESULTS)
    for png in (draw_heat_map(heat_map), draw_bar_chart(chart)):
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
