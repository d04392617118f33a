"""The report's pages in a real browser: on a phone and a projector, with nothing from outside."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, find_browser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from report_inputs import PLAN, failure, rank

from launcher.report.as_html import render_html
from launcher.report.build import build_report
from launcher.report.files import compare_reports, write_comparison, write_report
from launcher.report.plots import draw_charts
from launcher.report.run_report import Attempt, RunFiles

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium: apt-get install chromium"),
]

RUN = Path(__file__).parents[1] / "data" / "run"
LONG = "a-very-long-name-without-any-space-" * 6
# Widths of text in drawings as the browser lays it out, against the drawing's own width.
SPILLED = """
Array.from(document.querySelectorAll('figure svg')).filter(svg => svg.clientWidth).flatMap(svg =>
  Array.from(svg.querySelectorAll('text')).filter(text => {
    const box = text.getBBox(), all = svg.viewBox.baseVal;
    return box.x < -1 || box.x + box.width > all.width + 1
      || box.y < -1 || box.y + box.height > all.height + 1;
  }).map(text => text.textContent))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A real run's report, a comparison, and a failed run of many ranks with hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    run = folder / "run"
    shutil.copytree(RUN, run)
    write_report(run)
    paths = write_comparison(compare_reports([run, RUN], [None, None]), folder)
    attempt = Attempt(
        number=1, state="out_of_memory", reason=LONG, strategy={}, steps_done=3,
        peak_allocated_bytes=5, reaction=f"{LONG} {LONG}",
    )  # fmt: skip
    ranks = [rank(number, world_size=600, host=f"{LONG}{number // 8}") for number in range(600)]
    ranks[7] = rank(7, world_size=600, state="failed", failure=failure(LONG, LONG))
    report = build_report(
        RunFiles(
            name=f"<script>alert(1)</script>{LONG}", ranks=tuple(ranks), attempts=(attempt,),
            plan=PLAN | {"world_size": 600}, problems=(LONG,),
        )
    )  # fmt: skip
    hostile = folder / "hostile.html"
    hostile.write_text(render_html(report, draw_charts(report)), encoding="utf-8")
    comparison = next(path for path in paths if path.suffix == ".html")
    return {"run": run / "report.html", "comparison": comparison, "hostile": hostile}


@pytest.mark.parametrize("name", ["run", "comparison", "hostile"])
@pytest.mark.parametrize(("width", "height", "shown"), [(390, 844, "narrow"), (1920, 1080, "wide")])
def test_a_page_fits_its_screen_and_asks_for_nothing(  # noqa: PLR0917
    browser: Browser, pages: dict[str, Path], name: str, width: int, height: int, shown: str
) -> None:
    browser.troubles.clear()
    browser.open(pages[name], width=width, height=height, is_phone=width < 600)
    assert browser.troubles == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('script').length") == 0
    drawn = browser.evaluate(
        f"Array.from(document.querySelectorAll('.{shown} svg')).map(svg => svg.clientWidth)"
    )
    assert len(drawn) >= 2
    assert all(0.6 * min(width, 1440) < wide <= width for wide in drawn)
    assert browser.evaluate(SPILLED) == []


def test_the_browser_would_have_told(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<img src='http://127.0.0.1:9/x.png'><script>throw Error('told')</script>"
        "<div style='width:3000px'>wide</div>"
    )
    browser.troubles.clear()
    browser.open(bad, width=390, height=844, is_phone=True)
    assert any("told" in trouble for trouble in browser.troubles)
    assert any("asks for http://127.0.0.1:9/x.png" in trouble for trouble in browser.troubles)
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
