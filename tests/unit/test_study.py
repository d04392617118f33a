"""docs/study.md shows what was measured."""

from __future__ import annotations

import re

from generators import ROOT, script


def test_the_tables_of_the_study_are_those_of_its_results() -> None:
    # python benchmarks/make_study.py writes them.
    study = script("make_study")
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(study.tables({}))
    assert text == study.page(study.read_results())


def test_every_case_of_the_study_stands_in_a_table() -> None:
    study = script("make_study")
    listed = [study.LENGTHS, study.BATCHES, study.RANKS, study.TARGETS, study.SEGMENTS]
    shown = {row.case for rows in (*listed, study.FIGURE_2, study.NEAREST) for row in rows}
    shown |= set(study.PRECISIONS.values())
    # fp16 has the bytes of bf16.
    assert set(study.read_results()) - shown <= {"precision-fp16"}
