"""What a report says in the terminal, in Markdown, in HTML and in JSON."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_inputs import LOG, PLAN, RESULTS, failure, phase, rank
from rich.console import Console

from launcher.report.as_html import render_html
from launcher.report.as_json import report_to_json
from launcher.report.as_markdown import render_markdown
from launcher.report.as_terminal import render_terminal
from launcher.report.build import build_report
from launcher.report.chart_findings import chart_findings
from launcher.report.plots import draw_charts
from launcher.report.run_report import RunFiles, RunReport, select_ranks
from launcher.report.tables import detail_table
from launcher.report.text import describe_run, format_percent, format_ranks, printable
from launcher.report.text_plot import draw_curve

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> [red]x[/red] \x1b[2J `a` |"


def report_of(**content: Any) -> RunReport:
    return build_report(RunFiles(name=content.pop("name", "run"), **content))


def full_report() -> RunReport:
    return report_of(
        plan=PLAN, ranks=(rank(0), rank(1)), log=LOG, results=RESULTS, status={"state": "finished"}
    )


def hostile_report() -> RunReport:
    return report_of(
        name=HOSTILE,
        plan=PLAN | {"model": {"name": HOSTILE}, "time": {"bound_by": HOSTILE}},
        ranks=(rank(0, host=HOSTILE, state="failed", failure=failure(HOSTILE, HOSTILE)),),
        results={"sample": {"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE}},
        status={"state": "failed", "reason": HOSTILE},
        problems=(HOSTILE,),
    )


def terminal_text(report: RunReport, *, width: int = 100) -> str:
    stream = io.StringIO()
    Console(width=width, file=stream, force_terminal=False).print(render_terminal(report))
    return stream.getvalue()


class Tags(HTMLParser):
    """Collects the tags and attributes that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def tags_of(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed(page)
    return parser.found


def test_html_escapes_everything_that_comes_from_outside() -> None:
    tags = tags_of(render_html(hostile_report()))
    assert not [tag for tag, _ in tags if tag in ("script", "img", "iframe", "link", "object")]
    assert not [attrs for _, attrs in tags if any(name.startswith("on") for name in attrs)]


def test_html_fetches_nothing_from_outside() -> None:
    report = full_report()
    tags = tags_of(render_html(report, draw_charts(report)))
    assert [tag for tag, _ in tags].count("svg") == 2 * len(chart_findings(report)) > 0
    named = {name for _, attrs in tags for name in attrs}
    assert not named & {"src", "srcset", "href", "xlink:href"}
    policies = [attrs["content"] for _, attrs in tags if "http-equiv" in attrs]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]


def test_markdown_escapes_what_would_be_markup() -> None:
    markdown = render_markdown(hostile_report())
    outside_code = "".join(markdown.split("```")[::2])
    assert "<script>" not in outside_code.replace("\\<", "")
    assert "\x1b" not in markdown


def test_a_sample_cannot_leave_its_code_block() -> None:
    report = report_of(
        results={"sample": {"prompt": "a\n```\n# heading", "before": "", "after": ""}}
    )
    assert "````text\na\n```\n# heading\n````" in render_markdown(report)


def test_terminal_shows_hostile_text_as_text() -> None:
    text = terminal_text(hostile_report(), width=200)
    assert "\x1b" not in text
    assert "[red]x[/red]" in text


def test_failure_comes_before_everything_else() -> None:
    report = report_of(
        plan=PLAN,
        ranks=(
            rank(0),
            rank(1, state="out_of_memory", failure=failure("OutOfMemoryError", "CUDA")),
        ),
    )
    for text in (terminal_text(report), render_markdown(report), render_html(report)):
        assert text.index("out of memory") < text.index("Peak memory")
        assert text.index("OutOfMemoryError: CUDA") < text.index("Peak memory")
        assert text.count("Traceback (most recent call last)") == 1


def test_results_are_told_in_every_form() -> None:
    report = full_report()
    page = render_html(report).replace("\N{NO-BREAK SPACE}", " ")
    for text in (terminal_text(report, width=160), render_markdown(report), page):
        # By hand: 1 too much of 5, and 0.6 less of 3.
        assert "6.00 GiB predicted, 5.00 GiB measured (+20.0 %), in backward" in text
        assert "fell from 3.000 to 2.400 (-20.0 %)" in text
        assert "A letter." in text


def test_a_run_without_any_measurement_says_so() -> None:
    report = report_of(status={"state": "running"})
    for text in (terminal_text(report), render_markdown(report), render_html(report)):
        assert "still going" in text
        assert "No rank has written its measurements" in text


def test_every_rank_and_phase_has_a_row_up_to_sixteen_ranks() -> None:
    ranks = tuple(rank(number, world_size=16) for number in range(16))
    table = detail_table(report_of(plan=PLAN | {"world_size": 16}, ranks=ranks))
    assert len(table.rows) == 16 * 3
    assert table.rows[1][:5] == ("0", "forward", "4096.0", "4096.0", "+0.0 %")


def test_of_thousands_of_ranks_the_telling_ones_are_shown() -> None:
    ranks = [rank(n, world_size=3000, phases={"step": phase(5 + n / 3000)}) for n in range(3000)]
    ranks[7] = rank(7, world_size=3000, state="failed", phases={"step": phase(5)})
    report = report_of(plan=PLAN | {"world_size": 3000}, ranks=tuple(ranks))
    # Rank 7 now holds exactly 5 GiB as rank 0 does, so the middle of 3000 moves by one.
    assert [item.rank for item in select_ranks(report)] == [7, 1499, 2999]
    assert "3 of 3000 ranks shown" in terminal_text(report)
    assert len(report_to_json(report)["ranks"]) == 3000


def test_missing_ranks_are_named_with_their_number() -> None:
    report = report_of(plan=PLAN | {"world_size": 8}, ranks=(rank(0), rank(4)))
    assert "6 of 8 ranks left no readable file: 1-3, 5-7." in terminal_text(report)


def test_json_is_strict_and_has_the_documented_keys() -> None:
    report = report_of(
        plan=PLAN, ranks=(rank(0),), log=({"step": 1, "loss": float("inf")},), results=RESULTS
    )
    value = json.loads(json.dumps(report_to_json(report), allow_nan=False))
    assert value["schema_version"] == 1
    assert value["ranks"][0]["phases"]["backward"]["allocated_bytes"] == {
        "predicted": 6 * 2**30,
        "measured": 5 * 2**30,
        "error_fraction": pytest.approx(0.2),
    }
    assert value["missing_ranks"] == [1]
    assert value["loss"]["not_finite_steps"] == [1]


def test_a_long_traceback_keeps_its_end() -> None:
    long = failure("ValueError", "the end")
    long = type(long)(
        phase="step", type="ValueError", message="x", traceback="\n".join(map(str, range(1000)))
    )
    text = terminal_text(report_of(ranks=(rank(0, state="failed", failure=long),)))
    assert "999" in text
    assert "975 lines above" in text


def test_job_line_names_model_method_and_strategy() -> None:
    assert describe_run(full_report()) == (
        "tiny-llama (1M) · lora, 10k trainable · 512 tokens · bf16 · ZeRO-2 · optimizer on cpu"
        " · micro-batch 4 · 2 ranks on V100-32GB"
    )


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.1234, "+12.3 %"), (-0.05, "-5.0 %"), (-0.0001, "+0.0 %"), (25.0, "+2500 %"), (None, "-")],
)
def test_percent(fraction: float | None, expected: str) -> None:
    assert format_percent(fraction) == expected


def test_rank_lists_join_neighbours_and_stop() -> None:
    assert format_ranks([0, 1, 2, 7]) == "0-2, 7"
    assert format_ranks(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, …"


def test_printable_keeps_other_scripts_and_drops_controls() -> None:
    assert printable("héllo 世界\u3000\tend\n") == "héllo 世界\u3000\tend\n"
    assert printable("a\x1b\x07\u202eb\ud800") == "a\ufffd\ufffd\ufffdb\ufffd"


def test_curve_starts_top_left_and_ends_bottom_right_when_the_loss_falls() -> None:
    lines = draw_curve([(1, 3.0), (100, 1.0)], width=20, height=4).splitlines()
    assert lines[0].startswith("3 ┤⠉")
    assert lines[3].startswith("1 ┤")
    assert len(lines[3]) == len("1 ┤") + 20
    assert lines[5].split() == ["1", "step", "100"]


def test_a_curve_of_one_point_can_be_drawn() -> None:
    assert "2.5 ┤" in draw_curve([(5, 2.5)])


KEYS = [
    *(
        "memory",
        "phases",
        "forward",
        "components",
        "allocated_bytes",
        "world_size",
        "model",
        "name",
    ),
    *("time", "step_seconds", "strategy", "sample", "prompt", "before", "eval_loss_before"),
    *("eval_loss_after", "step", "loss", "state"),
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=20,
)
MAPPINGS = st.dictionaries(
    st.sampled_from(["memory", "model", "time", "world_size", "sample", "step", "loss", "state"]),
    JSON_VALUES,
)


@settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(plan=MAPPINGS, status=MAPPINGS, results=MAPPINGS, log=st.lists(MAPPINGS, max_size=3))
def test_no_content_of_the_files_can_stop_a_report(
    plan: dict[str, Any], status: dict[str, Any], results: dict[str, Any], log: list[dict[str, Any]]
) -> None:
    report = report_of(plan=plan, status=status, results=results, log=tuple(log), ranks=(rank(0),))
    terminal_text(report)
    render_markdown(report).encode()
    render_html(report).encode()
    json.dumps(report_to_json(report), allow_nan=False)


def keys_of(value: object) -> set[str]:
    """All keys of a JSON value, but the names of phases, components and strategy fields."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if not isinstance(value, dict):
        return set()
    inner = [
        item
        for key, item in value.items()
        if key not in ("components", "strategy") and not (key == "phases" and "rank" in value)
    ]
    inner += list(value["phases"].values()) if "rank" in value and "phases" in value else []
    return set(value).union(*map(keys_of, inner))


def test_every_key_of_the_json_is_documented() -> None:
    report = report_of(
        plan=PLAN,
        ranks=(rank(0), rank(1, state="failed", failure=failure("ValueError", "x"))),
        log=LOG,
        results=RESULTS,
    )
    document = Path(__file__).parents[2] / "docs" / "report-json.md"
    documented = set(re.findall(r"[`\"](\w+)[`\"]", document.read_text(encoding="utf-8")))
    keys = keys_of(report_to_json(report))
    assert len(keys) > 70
    assert keys <= documented
