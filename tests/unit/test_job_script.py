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
        ["bash", str(script)], capture_output=True, check=True, env=dict(os.environ), cwd="/"
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
    assert "--force_multi" not in argv
    assert request.files["hostfile"] == "node1 slots=2\nnode2 slots=2\n"
    assert "export DS_ENV_FILE=/runs/one/deepspeed_env\n" in request.files["job.sh"]
    assert "ServerAliveInterval" in request.files["job.sh"]


def test_a_single_remote_host_is_forced_to_run_there_and_not_here() -> None:
    assert "--force_multi" in deepspeed_argv(replace(JOB, hosts=HOSTS[:1]))


def test_the_environment_file_has_only_lines_that_deepspeed_can_split() -> None:
    """DeepSpeed 0.19.8 calls ``line.split('=', maxsplit=1)`` on each and fails on the rest."""
    job = replace(JOB, hosts=HOSTS, extra_env={"EXTRA": 'a=b $HOME `id` "q"'})
    lines = render_job(job, files={}).files["deepspeed_env"].splitlines()
    values = dict(line.split("=", maxsplit=1) for line in lines)
    assert values["DS_ACCELERATOR"] == "cpu"
    # DeepSpeed adds the double quotes, in which these stay literal.
    assert values["EXTRA"] == 'a=b \\$HOME \\`id\\` \\"q\\"'
    shell = f'printf %s "{values["EXTRA"]}"'
    printed = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    assert printed.stdout == 'a=b $HOME `id` "q"'


@pytest.mark.parametrize("value", ["two\nlines", "100%"])
def test_values_that_pdsh_cannot_pass_on_are_refused(value: str) -> None:
    with pytest.raises(SetupError, match="EXTRA"):
        render_job(replace(JOB, hosts=HOSTS, extra_env={"EXTRA": value}), files={})


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
