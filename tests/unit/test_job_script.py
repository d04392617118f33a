"""job.sh: what it exports, how it quotes, and what never goes into a file."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from launcher.errors import HostfileError, RunDirError, SetupError
from launcher.hostfile import Host
from launcher.job_script import (
    DeepSpeedJob,
    deepspeed_argv,
    is_readable_by_jit,
    job_environment,
    render_job,
)

JOB = DeepSpeedJob(
    run_dir=PurePosixPath("/runs/one"),
    run_id="0123abcd",
    python=PurePosixPath("/venv/bin/python"),
    ranks_per_node=2,
    device_type="cpu",
    master_port=29511,
    omp_num_threads=1,
)
GPU_JOB = replace(JOB, device_type="cuda", compute_capability=(9, 0))
HOSTS = (Host(name="node1", slots=2), Host(name="node2", slots=2))

SHOW = "[[ -v $n ]] && printf '%s\\0' \"${!n}\" || true"
HOSTILE = ["a b", "x;rm -rf y", "$(id)", "`id`", "quo'te\"s", "-rf", "ünïcode", "new\nline", "*"]


@pytest.fixture
def fake_deepspeed(tmp_path: Path) -> Path:
    """Make a folder with a ``deepspeed`` that prints its arguments and some of its environment."""
    folder = tmp_path / "v env" / "bin"
    folder.mkdir(parents=True)
    program = folder / "deepspeed"
    program.write_text('#!/bin/sh\nprintf \'%s\\0\' "$PWD" "$ZEROFIT_RUN_ID" "$EXTRA" "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_reach_the_launcher_as_they_are(
    tmp_path: Path, fake_deepspeed: Path, name: str
) -> None:
    run_dir = tmp_path / name
    run_dir.mkdir()
    job = replace(
        JOB,
        run_dir=PurePosixPath(run_dir),
        python=PurePosixPath(fake_deepspeed / "python"),
        extra_env={"EXTRA": name},
    )
    script = run_dir / "job.sh"
    script.write_text(render_job(job, files={}).files["job.sh"])
    done = subprocess.run(
        ["bash", str(script)],
        capture_output=True,
        check=True,
        env={**os.environ, "ZEROFIT_RUN_ID": "watched"},
        cwd="/",
    )
    words = done.stdout.decode().split("\0")[:-1]
    assert words[:3] == [str(run_dir), "0123abcd", name]
    assert words[3:] == list(deepspeed_argv(job))[1:]
    assert words[-1] == str(run_dir)


def test_ranks_on_the_processor_say_so_to_deepspeed_and_set_nothing_of_cuda() -> None:
    env = job_environment(JOB)
    assert env["DS_ACCELERATOR"] == "cpu"
    assert env["OMP_NUM_THREADS"] == "1"
    assert not [name for name in env if "CUDA" in name or "ALLOC" in name]


def test_gpu_jobs_get_an_architecture_that_deepspeed_can_read() -> None:
    env = job_environment(GPU_JOB)
    assert env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert env["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in job_environment(replace(GPU_JOB, expandable_segments=False))


@pytest.mark.parametrize(
    ("value", "is_readable"),
    [
        ("9.0", True),
        ("7.0;8.0+PTX", True),
        ("8.0 9.0", True),
        # int('0a') in DeepSpeed's compute_capability_args.
        ("9.0a", False),
        ("8.0;9.0a+PTX", False),
        ("Hopper", False),
        ("native", False),
        ("8.0,9.0", False),
        ("90", False),
    ],
)
def test_arch_lists_that_stop_deepspeeds_kernel_builder_are_known(
    value: str, is_readable: bool
) -> None:
    assert is_readable_by_jit(value) is is_readable


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "hf_token"]
)
def test_secrets_are_refused_in_files(name: str) -> None:
    with pytest.raises(SetupError, match=name):
        render_job(replace(JOB, extra_env={name: "hf_123"}), files={})


def test_a_name_that_only_resembles_a_secret_is_accepted() -> None:
    assert job_environment(replace(JOB, extra_env={"TOKENIZERS_PARALLELISM": "true"}))


def test_chosen_gpus_are_named_because_deepspeed_ignores_cuda_visible_devices() -> None:
    argv = deepspeed_argv(replace(GPU_JOB, gpu_ids=(2, 5)))
    assert argv[argv.index("--include") + 1] == "localhost:2,5"
    assert "--num_gpus" not in argv


def test_a_local_job_never_takes_a_hostfile_that_happens_to_be_there() -> None:
    argv = deepspeed_argv(JOB)
    assert argv[argv.index("--hostfile") + 1] == "/dev/null"
    assert argv[argv.index("--num_gpus") + 1] == "2"


def test_jobs_on_hosts_name_the_hostfile_by_its_full_path() -> None:
    request = render_job(replace(JOB, hosts=HOSTS), files={})
    argv = deepspeed_argv(replace(JOB, hosts=HOSTS))
    assert argv[argv.index("--hostfile") + 1] == "/runs/one/hostfile"
    assert argv[argv.index("--master_addr") + 1] == "node1"
    assert "--force_multi" not in argv
    assert request.files["hostfile"] == "node1 slots=2\nnode2 slots=2\n"
    assert "ServerAliveInterval" in request.files["job.sh"]


def test_a_single_remote_host_is_forced_to_run_there_and_not_here() -> None:
    assert "--force_multi" in deepspeed_argv(replace(JOB, hosts=HOSTS[:1]))


def test_hosts_get_what_is_on_the_list_by_a_file_that_only_its_owner_reads(
    tmp_path: Path, fake_deepspeed: Path
) -> None:
    hostile = "a=b $HOME `id` \"q\" 'q' 100%\nnext ü"
    job = replace(
        JOB,
        hosts=HOSTS,
        run_dir=PurePosixPath(tmp_path),
        python=PurePosixPath(fake_deepspeed / "python"),
        pass_env=("MINE_*",),
        extra_env={"EXTRA": hostile},
    )
    (tmp_path / "job.sh").write_text(render_job(job, files={}).files["job.sh"])
    outside = {
        "PATH": os.environ["PATH"],
        "ZEROFIT_RUN_ID": "watched",
        "HF_TOKEN": hostile,
        "MINE_1": "one",
        "THEIRS": "no",
        "MLFLOW_TRACKING_TOKEN": "secret",
    }
    subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=outside, check=True, capture_output=True)
    written = tmp_path / "environment.sh"
    assert written.stat().st_mode & 0o777 == 0o600
    names = ["HF_TOKEN", "MINE_1", "MLFLOW_TRACKING_TOKEN", "EXTRA", "ZEROFIT_RUN_ID", "THEIRS"]
    shown = subprocess.run(
        ["bash", "-c", f"source {written}; for n in {' '.join(names)}; do {SHOW}; done"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split("\0")[:-1] == [hostile, "one", "secret", hostile, "0123abcd"]


@pytest.mark.parametrize("name", ["a b", "x;rm", "$(id)", "", "*"])
def test_what_is_no_variable_cannot_be_passed_on(name: str) -> None:
    with pytest.raises(SetupError, match="is not the name of a variable"):
        render_job(replace(JOB, hosts=HOSTS, pass_env=(name,)), files={})


def test_under_mpirun_each_rank_is_a_script_that_reads_the_environment_first() -> None:
    request = render_job(replace(JOB, hosts=HOSTS, host_launcher="openmpi"), files={})
    assert request.files["rank.sh"].splitlines()[2] == "source /runs/one/environment.sh"
    assert "--no_python /runs/one/rank.sh" in request.files["job.sh"]


def test_chosen_gpus_of_hosts_are_named_to_deepspeed() -> None:
    hosts = tuple(replace(host, gpu_ids=(1, 3)) for host in HOSTS)
    argv = deepspeed_argv(replace(JOB, hosts=hosts))
    assert argv[argv.index("--include") + 1] == "node1:1,3@node2:1,3"


@pytest.mark.parametrize("name", [n for n in HOSTILE if n != "-rf"])
def test_hostile_run_directories_are_refused_with_hosts(name: str) -> None:
    job = replace(JOB, hosts=HOSTS, run_dir=PurePosixPath("/runs") / name)
    with pytest.raises(RunDirError, match="remote shell"):
        render_job(job, files={})


def test_hosts_with_different_slots_are_refused() -> None:
    with pytest.raises(HostfileError):
        render_job(replace(JOB, hosts=(HOSTS[0], Host(name="c", slots=4))), files={})


def test_the_runs_own_files_are_in_the_request() -> None:
    request = render_job(JOB, files={"ds_config.json": "{}\n"})
    assert request.files["ds_config.json"] == "{}\n"
    assert request.argv == ("bash", "job.sh")
    assert request.env == {"ZEROFIT_RUN_ID": "0123abcd"}
