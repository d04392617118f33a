"""Gathering what Slurm has run of a sweep, from the run directories alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.bench import array
from launcher.bench.array import gather
from launcher.bench.runner import Outputs, read_outputs
from launcher.bench.sweep import parse_sweep
from launcher.errors import RunDirError
from launcher.peaks import PhasePeaks, RankPeaks, peaks_to_json


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    return Outputs(folder=tmp_path, stem="sweep", runs=tmp_path / "runs")


def submit(outputs: Outputs, case: str, state: rd.RunState, *, number: int = 1) -> Path:
    """Leave what a submission leaves, and a run in a state."""
    run_dir = rd.create(outputs.runs / f"{case}-{number}")
    phase = PhasePeaks(
        peak_allocated_bytes=10, peak_reserved_bytes=11, device_used_bytes=None,
        host_rss_bytes=5, seconds=1.0, count=1,
    )  # fmt: skip
    peaks = RankPeaks(
        rank=0, local_rank=0, world_size=1, host="n", pid=1, device="cuda", device_name="H",
        state="running", steps_done=3, phases={"step": phase}, step_seconds=(1.0, 1.0, 1.0),
    )  # fmt: skip
    rd.write_json(rd.rank_file(run_dir, 0), peaks_to_json(peaks))
    rd.write_status(run_dir, state, reason="node failure" if state == "failed" else None)
    content = {
        "case": case, "predicted": {"step_seconds": 2.0}, "run_dir": str(run_dir),
        "recipe": {"model": {"name_or_path": "tiny"}},
    }  # fmt: skip
    with outputs.submitted.open("a") as stream:
        stream.write(json.dumps(content) + "\n")
    return run_dir


def test_what_has_ended_becomes_a_result_with_its_prediction_and_the_rest_waits(
    outputs: Outputs,
) -> None:
    submit(outputs, "done", "finished")
    submit(outputs, "broken", "failed")
    submit(outputs, "later", "created")
    said: list[str] = []
    made, waiting = gather(outputs, (), say=said.append)
    assert {result.case: result.state for result in made} == {
        "done": "finished", "broken": "failed",
    }  # fmt: skip
    assert waiting == {"later"}
    assert made[0].error_fraction("step_seconds") == 1.0
    assert "node failure" in (made[1].failure or "")
    assert read_outputs(outputs) == made


def test_what_was_gathered_is_not_gathered_again_but_a_second_try_is(outputs: Outputs) -> None:
    submit(outputs, "a", "failed")
    first, _ = gather(outputs, (), say=str)
    assert gather(outputs, first, say=str) == ((), frozenset())
    submit(outputs, "a", "finished", number=2)
    second, _ = gather(outputs, first, say=str)
    assert [result.state for result in second] == ["finished"]


def test_without_submissions_there_is_nothing_to_gather(outputs: Outputs) -> None:
    assert gather(outputs, (), say=str) == ((), frozenset())


@pytest.mark.parametrize("line", ["{}", "[1]", "half a li"])
def test_a_broken_list_of_submissions_is_named_with_its_line(outputs: Outputs, line: str) -> None:
    outputs.submitted.write_text(line + "\n")
    with pytest.raises(RunDirError, match=r"sweep\.submitted\.jsonl:1"):
        gather(outputs, (), say=str)


def test_a_run_directory_that_is_gone_is_a_failed_case_and_blocks_no_other(
    outputs: Outputs,
) -> None:
    shutil.rmtree(submit(outputs, "gone", "created"))
    submit(outputs, "done", "finished")
    (submit(outputs, "broken", "finished") / rd.JOB).write_text("half a fi")
    made, waiting = gather(outputs, (), say=str)
    assert {result.case: result.state for result in made} == {"gone": "failed", "done": "finished"}
    assert "the run directory is gone" in str(made[0].failure)
    assert waiting == {"broken"}


def test_slurm_gets_no_job_that_cannot_be_written_down(
    outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array, "submit_array", lambda *_, **__: pytest.fail("it was submitted"))
    outputs.submitted.mkdir()
    cases = parse_sweep(
        "defaults: {model: {name_or_path: smollm2-135m, random_weights: true}, max_seq_len: 64,"
        " cluster: {gpu: H100-80GB}, optim: {max_steps: 1}}\ncases: [{name: a}]",
        source="s",
        overrides=(),
    )
    with pytest.raises(RunDirError, match="cannot be written: Is a directory"):
        array.submit_cases(cases, outputs, say=str, max_parallel=None)
