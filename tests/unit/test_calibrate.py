"""Constants are recovered from runs of a site that has others, and nothing is made worse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from planning_inputs import cluster, workload
from report_inputs import phase, rank

from launcher import run_dir
from launcher.calibrate.fit import FAMILIES, fit_constants, fit_gpu, predict
from launcher.calibrate.runs import MeasuredRun, read_runs
from launcher.commands.calibrate import calibrate
from launcher.errors import RunDirError
from launcher.hardware import SiteConstants
from launcher.peaks import peaks_to_json
from launcher.planning.plan import plan_to_json, strategy_to_json
from launcher.planning.planner import make_plan
from launcher.planning.view import render_plan
from launcher.predict.memory import estimate_memory
from launcher.predict.site_constants import NAMES, default_constants, with_site_constants
from launcher.predict.step_time import estimate_time
from launcher.prepare import resolve_cluster
from launcher.recipe_sections import ClusterSection
from launcher.strategy import Checkpointing, Method, Strategy, ZeroStage

H100 = cluster("H100-80GB", gpus=1)
ROOT = Path(__file__).parents[2]
MEMORY = ("peak_reserved_bytes", "device_used_bytes")


def run(
    tokens: int,
    truth: Mapping[str, float],
    *,
    stage: ZeroStage = 2,
    method: Method = Method.lora,
    checkpointing: Checkpointing = Checkpointing.none,
) -> MeasuredRun:
    """A run of a site whose constants are ``truth``."""
    plain = MeasuredRun(
        name=f"{method}-{tokens}-z{stage}",
        workload=workload("llama3.2-1b", place=H100, method=method, tokens=tokens, batch=1),
        strategy=Strategy(zero_stage=stage, gradient_checkpointing=checkpointing),
        cluster=H100,
        measured={},
    )
    quantities = {family.quantity for family in FAMILIES} | {"peak_allocated_bytes"}
    constants = {**default_constants(H100.gpu), **truth}
    measured = {q: predict(plain, constants, q)[0] for q in quantities}
    return replace(plain, measured=measured)


def site(truth: Mapping[str, float]) -> list[MeasuredRun]:
    """Twelve runs of different lengths and methods."""
    methods = (Method.lora, Method.full, Method.qlora)
    ways = (Checkpointing.none, Checkpointing.full)
    return [
        run(256 * (2 + n), truth, method=methods[n % 3], stage=(2, 3)[n // 2 % 2],
            checkpointing=ways[n // 3 % 2])
        for n in range(12)
    ]  # fmt: skip


def test_a_context_of_another_size_is_found() -> None:
    # 0.25 GB more than the table has for the H100, as another driver might take.
    true_bytes = H100.gpu.context_bytes + 250e6
    fit = fit_gpu(site({"context_bytes": true_bytes}), used_now={})
    assert fit.constants == {"context_bytes": pytest.approx(true_bytes, rel=1e-4)}
    (verdict,) = [v for v in fit.verdicts if v.is_taken]
    assert verdict.family.quantity == "device_used_bytes"
    assert verdict.error_before > 0.005
    assert verdict.error_after < 1e-4


def test_a_slower_host_and_slower_matrix_products_are_told_apart() -> None:
    # A host that takes 30 us for an operation, kernels that reach half of the peak.
    truth = {"host_op_seconds": 30e-6, "matmul_fraction": 0.5}
    family = next(f for f in FAMILIES if f.quantity == "step_seconds")
    found = fit_constants(family, site(truth), default_constants(H100.gpu))
    assert found["host_op_seconds"] == pytest.approx(30e-6, rel=0.02)
    assert found["matmul_fraction"] == pytest.approx(0.5, rel=0.02)
    assert found.get("flash_fraction", 0.59) == pytest.approx(0.59, rel=0.05)


def test_a_few_runs_that_went_wrong_turn_nothing() -> None:
    true_bytes = H100.gpu.context_bytes + 250e6
    runs = site({"context_bytes": true_bytes})
    odd = run(512, {"context_bytes": 6 * true_bytes})
    family = next(f for f in FAMILIES if f.quantity == "device_used_bytes")
    found = fit_constants(family, [*runs, odd], default_constants(H100.gpu))
    assert found["context_bytes"] == pytest.approx(true_bytes, rel=0.02)


def test_runs_that_agree_with_the_constants_change_none() -> None:
    fit = fit_gpu(site({}), used_now={})
    assert not fit.is_better
    assert fit.constants == {}


def test_what_would_predict_the_other_half_worse_is_not_taken() -> None:
    # Runs at even positions say that a process takes a third more, the judges that it does not.
    more = {"process_host_bytes": 2.8e9}
    runs = [run(512 + 256 * n, more if n % 2 == 0 else {}) for n in range(10)]
    fit = fit_gpu(runs, used_now={})
    (verdict,) = [v for v in fit.verdicts if v.family.quantity == "host_bytes_per_node"]
    assert verdict.changes
    assert verdict.error_after > verdict.error_before
    assert not verdict.is_taken
    assert "process_host_bytes" not in fit.constants


def test_a_few_runs_are_judged_by_fits_to_the_others() -> None:
    true_bytes = H100.gpu.context_bytes + 250e6
    runs = [
        replace(item, measured={name: item.measured[name] for name in MEMORY})
        for item in site({"context_bytes": true_bytes})[:4]
    ]
    fit = fit_gpu(runs, used_now={})
    assert fit.constants["context_bytes"] == pytest.approx(true_bytes, rel=1e-4)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(RunDirError, match="3 usable runs on H100-80GB are too few"):
        fit_gpu(site({})[:3], used_now={})


def test_constants_that_a_site_has_already_are_what_must_be_beaten() -> None:
    true_bytes = H100.gpu.context_bytes + 250e6
    used = {"context_bytes": true_bytes}
    fit = fit_gpu(site({"context_bytes": true_bytes}), used_now=used)
    assert not fit.is_better
    assert fit.constants == used


def test_every_constant_reaches_the_prediction() -> None:
    # Each one doubled (shares of a peak: halved) moves memory or time of some strategy.
    shapes = [
        (method, Strategy(zero_stage=stage, expandable_segments=stage == 2))
        for method in Method
        for stage in (2, 3)
    ]

    def predictions(values: Mapping[str, float], *, padded: bool) -> list[object]:
        constants = SiteConstants(values=tuple(values.items()), num_runs=1, fitted_at="")
        place = with_site_constants(H100, constants)
        found: list[object] = []
        for method, strategy in shapes:
            work = workload(place=place, method=method, tokens=512, batch=1, has_padding=padded)
            memory = estimate_memory(work, strategy, place)
            found += [memory.device_used_bytes, memory.host_bytes_per_node]
            found.append(estimate_time(work, strategy, place).step_seconds)
        return found

    defaults = default_constants(H100.gpu)
    plain = {padded: predictions(defaults, padded=padded) for padded in (False, True)}
    for name in NAMES:
        changed = defaults | {name: defaults[name] * (0.5 if "fraction" in name else 2.0)}
        assert any(predictions(changed, padded=p) != plain[p] for p in plain), name


def test_a_plan_names_what_was_calibrated() -> None:
    from rich.console import Console

    values = (("context_bytes", 9e8), ("host_op_seconds", 30e-6))
    constants = SiteConstants(values=values, num_runs=12, fitted_at="2026-11-23")
    place = with_site_constants(H100, constants)
    plan = make_plan(workload(place=place), place)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render_plan(plan))
    said = (
        "calibrated at this site, by 12 runs (2026-11-23): context_bytes 858.31 MiB, "
        "host_op_seconds 30 µs"
    )
    assert said in captured.get()
    assert plan_to_json(plan)["calibrated"]["constants"]["context_bytes"] == 9e8
    assert plan_to_json(make_plan(workload(place=H100), H100))["calibrated"] is None


@pytest.mark.parametrize("args", [["nowhere"], ["."]])
def test_a_path_without_runs_is_refused(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(calibrate, args)
    assert isinstance(result.exception, RunDirError)


def test_runs_of_bench_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    lines = (ROOT / "benchmarks" / "results" / "h100.jsonl").read_text().splitlines()[:2]
    odd = [
        json.loads(lines[0]) | {"case": "elsewhere", "device_name": "Voodoo 2"},
        json.loads(lines[0]) | {"case": "broke", "state": "out_of_memory"},
        json.loads(lines[0]) | {"case": "halved", "measured": []},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(f"{line}\n" for line in [*lines, *map(json.dumps, odd)]))
    runs, problems = read_runs([path])
    assert len(runs) == 2
    assert [problem.partition(":")[0] for problem in problems] == [
        "elsewhere", "broke", "halved",
    ]  # fmt: skip


def write_run(folder: Path, truth: Mapping[str, float], *, tokens: int) -> None:
    """A finished run directory of that site, as its rank would have left it."""
    measured = run(tokens, truth).measured
    (folder / run_dir.RANKS).mkdir(parents=True)
    recipe = "model: {name_or_path: llama3.2-1b, random_weights: true}\noptim: {max_steps: 5}\n"
    (folder / run_dir.RECIPE).write_text(recipe)
    strategy = strategy_to_json(Strategy(zero_stage=2))
    run_dir.write_json(
        folder / run_dir.PLAN, {"strategy": strategy, "max_seq_len": tokens, "precision": "bf16"}
    )
    run_dir.write_status(folder, "finished")
    peaks = phase(
        0,
        peak_allocated_bytes=round(measured["peak_allocated_bytes"]),
        peak_reserved_bytes=round(measured["peak_reserved_bytes"]),
        device_used_bytes=round(measured["device_used_bytes"]),
        host_rss_bytes=round(measured["host_bytes_per_node"]),
    )
    only = rank(
        0, world_size=1, device_name="NVIDIA H100 80GB HBM3", phases={"step": peaks},
        step_seconds=(9.0, 1.0, measured["step_seconds"]), tokens_per_step=tokens,
    )  # fmt: skip
    run_dir.write_json(run_dir.rank_file(folder, 0), peaks_to_json(only))


def test_run_directories_calibrate_later_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    true_bytes = H100.gpu.context_bytes + 250e6
    for number in range(4):
        truth = {"context_bytes": true_bytes}
        write_run(tmp_path / "runs" / f"run-{number}", truth, tokens=1024 + 512 * number)
    result = CliRunner().invoke(calibrate, [str(tmp_path / "runs")])
    assert result.exit_code == 0, result.output
    assert "H100-80GB: 4 runs" in result.output
    assert "context_bytes" in result.output
    place = resolve_cluster(ClusterSection(gpu="H100-80GB"))
    assert place.gpu.context_bytes == pytest.approx(true_bytes, rel=1e-4)
    assert resolve_cluster(ClusterSection(gpu="A100-80GB")).site is None
    again = CliRunner().invoke(calibrate, [str(tmp_path / "runs")])
    assert "nothing was written" in again.output
