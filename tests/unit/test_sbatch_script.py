"""job.sbatch: what Slurm is asked for, how it is quoted, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from launcher.errors import LauncherError, RunDirError, SetupError
from launcher.recipe_sections import SlurmSection
from launcher.sbatch_directives import (
    directive,
    minutes_of,
    suggest_signal_seconds,
    suggest_time_limit_minutes,
)
from launcher.sbatch_script import JOB_SBATCH, SlurmJob, port_of, render_slurm_job

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from sbatch_cases import FOLDER, JOBS, scripts

GPU_JOB = JOBS["gpus-per-node"]


def script_of(job: SlurmJob) -> str:
    return render_slurm_job(job, files={}).files[JOB_SBATCH]


def with_settings(**settings: object) -> SlurmJob:
    return replace(GPU_JOB, settings=SlurmSection(**settings))  # type: ignore[arg-type]


def test_scripts_are_those_that_were_reviewed() -> None:
    """After a change on purpose: python tests/golden/sbatch_cases.py, and look at the diff."""
    stored = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert scripts() == stored
    assert len(stored) == 10


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_bash_can_read_the_script(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


def test_one_task_is_started_for_each_gpu_and_a_failing_one_ends_all() -> None:
    script = script_of(GPU_JOB)
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n#SBATCH --gpus-per-node=2\n" in script
    shape = 'srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --nodelist="$nodes"'
    assert f"{shape} --kill-on-bad-exit=1 --label" in script


def test_nodes_are_looked_at_before_anything_runs_on_them_unless_told_not_to() -> None:
    script = script_of(with_settings(spare_nodes=1))
    assert "#SBATCH --nodes=3\n" in script
    assert "job_preflight --run-dir /scratch/runs/one --num-nodes 2 --ranks-per-node 2" in script
    assert script.index("job_preflight") < script.index("launcher.worker.data")
    without = script_of(with_settings(preflight=False))
    assert "job_preflight" not in without
    assert "--nodelist" not in without
    with pytest.raises(SetupError, match="nothing looks for bad nodes"):
        script_of(with_settings(preflight=False, spare_nodes=1))


def test_data_is_tokenised_once_before_the_ranks_start() -> None:
    lines = script_of(GPU_JOB).splitlines()
    tokenise = next(i for i, line in enumerate(lines) if "launcher.worker.data" in line)
    ranks = next(i for i, line in enumerate(lines) if "launcher.worker.train" in line)
    assert tokenise < ranks
    assert "--ntasks=1" in lines[tokenise - 1]
    assert lines[tokenise - 2] == "if [[ ! -e data/summary.json && ! -e stop ]]; then"


def test_a_job_on_the_processor_asks_for_no_gpus() -> None:
    script = script_of(JOBS["cpu"])
    assert "gpu" not in script.lower().replace("one task per gpu", "")
    assert "export DS_ACCELERATOR=cpu" in script


@pytest.mark.parametrize(
    ("gres", "written"),
    [("gpu", "gpu:2"), ("gpu:h100", "gpu:h100:2"), ("gpu:h100:2,nvme:1", "gpu:h100:2,nvme:1")],
)
def test_gres_gets_the_number_of_gpus_of_the_plan(gres: str, written: str) -> None:
    script = script_of(with_settings(gres=gres))
    assert f"#SBATCH --gres={written}\n" in script
    assert "gpus-per-node" not in script


@pytest.mark.parametrize("gres", ["gpu:4", "gpu:h100:8", "nvme"])
def test_gres_that_contradicts_the_plan_is_an_error(gres: str) -> None:
    with pytest.raises(SetupError, match="the plan has 2 GPUs"):
        script_of(with_settings(gres=gres))


def test_settings_of_the_user_win_over_what_is_suggested() -> None:
    script = script_of(with_settings(time="2-00", signal_seconds=600, requeue=False))
    assert "#SBATCH --time=2-00\n" in script
    assert "#SBATCH --signal=B:USR1@600\n#SBATCH --no-requeue\n" in script


def test_all_settings_that_cannot_be_used_are_named_at_once() -> None:
    with pytest.raises(SetupError) as caught:
        script_of(
            with_settings(
                job_name="two\nlines",
                partition=" ",
                time="tomorrow",
                extra=("--nodes=4", "rm -rf /", "--comment=a\nb"),
                container_mounts=("/a:/b",),
            )
        )
    said = str(caught.value)
    for key in ("slurm.job_name", "slurm.partition", "slurm.time", "--nodes, which zerofit"):
        assert key in said
    assert "'rm -rf /'" in said
    assert "'--comment=a\\nb'" in said
    assert "slurm.container names no image" in said


@pytest.mark.parametrize("option", ["--nod=3", "--outp=x", "--arr=0-9", "--no-r", "--clusters=b"])
def test_a_beginning_of_an_option_that_the_script_depends_on_is_refused(option: str) -> None:
    with pytest.raises(SetupError, match="slurm.extra holds " + option.partition("=")[0]):
        script_of(with_settings(extra=(option,)))
    # Longer ones are other options.
    assert "--nodelist=a" in script_of(with_settings(extra=("--nodelist=a", "--time-min=5")))


@pytest.mark.parametrize("name", ["new\nline", "100%", "back\\slash", "tab\t"])
def test_a_path_that_slurm_would_read_otherwise_is_refused(name: str) -> None:
    ranks = replace(GPU_JOB.ranks, run_dir=PurePosixPath("/runs") / name)
    with pytest.raises(RunDirError):
        script_of(replace(GPU_JOB, ranks=ranks))


@pytest.mark.parametrize("name", ["a:b", "a,b"])
def test_a_path_that_a_container_would_mount_otherwise_is_refused(name: str) -> None:
    ranks = replace(GPU_JOB.ranks, run_dir=PurePosixPath("/runs") / name)
    assert name in script_of(replace(GPU_JOB, ranks=ranks))
    job = replace(with_settings(container="image", container_runtime="pyxis"), ranks=ranks)
    with pytest.raises(RunDirError, match="end of a mount"):
        script_of(job)


def test_values_are_quoted_as_sbatch_reads_them() -> None:
    # Read back by sbatch 22.05.8: a "b" 'c' # d $(id) x;rm ü \ e
    name = "a \"b\" 'c' # d $(id) x;rm ü \\ e"
    written = '#SBATCH --job-name="a \\"b\\" \'c\' # d $(id) x;rm ü \\\\ e"'
    assert directive("job-name", name) == written


def test_a_container_without_a_runtime_is_an_error() -> None:
    with pytest.raises(LauncherError, match="say pyxis or apptainer"):
        script_of(with_settings(container="image"))


def test_the_port_is_derived_from_the_job_and_stays_below_outgoing_connections() -> None:
    assert port_of(4242) == 24_242
    assert all(20_000 <= port_of(job_id) < 32_768 for job_id in (1, 11_999, 12_000, 67_108_863))


def test_the_time_limit_follows_from_the_predicted_steps() -> None:
    # 15 min to start and 1.7 x 1000 x 3.6 s = 102 min, in whole quarters of an hour
    assert suggest_time_limit_minutes(1000, 3.6) == 120
    assert suggest_time_limit_minutes(1, 0.1) == 30


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("90", 90.0),
        ("2:30", 2.5),
        ("1:30:00", 90.0),
        ("1-12", 2160.0),
        ("1-00:30", 1470.0),
        ("infinite", None),
    ],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(written: str, minutes: float | None) -> None:
    assert minutes_of(written) == minutes


def test_ranks_hear_of_the_limit_early_enough_to_write_their_checkpoint() -> None:
    # 60 s of Slurm's clock, 1.7 x 10 s for the step, 40 GB at 200 MB/s
    assert suggest_signal_seconds(200.0, 10.0) == 60 + 17 + 200
    assert suggest_signal_seconds(0, 0.1) == 120


def test_rendering_for_1024_nodes_is_quick_and_small() -> None:
    ranks = replace(GPU_JOB.ranks, ranks_per_node=8)
    script = script_of(replace(GPU_JOB, ranks=ranks, num_nodes=1024))
    assert "#SBATCH --nodes=1024" in script
    assert len(script) < 6_200
