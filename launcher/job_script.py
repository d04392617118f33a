"""What a backend runs: the files of a job and the text of ``job.sh``, which needs no zerofit."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Literal

from launcher.errors import RunDirError, SetupError
from launcher.hostfile import Host, equal_slots, render_hostfile

JOB_SCRIPT = "job.sh"
HOSTFILE = "hostfile"
DEEPSPEED_ENV = "deepspeed_env"
RUN_ID_VARIABLE = "ZEROFIT_RUN_ID"
"""Marks every process of a run, so that none is left behind when it ends."""
WORKER_MODULE = "launcher.worker.train"
DATA_MODULE = "launcher.worker.data"
DATA_SUMMARY = "data/summary.json"
"""Exists when the data module has done its work."""

# What DeepSpeed's JIT reads (0.19.8 ops/op_builder/builder.py, compute_capability_args): it
# calls int() on both sides of the dot, so torch's '9.0a', 'native' or 'Hopper' stop the build.
_JIT_ARCH = re.compile(r"\d+\.\d+(\+PTX)?")
# DeepSpeed hands these to a remote shell without quotes (0.19.8 launcher/multinode_runner.py).
_SAFE_IN_REMOTE_SHELL = re.compile(r"[\w@+=:,./-]+", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|(API)?KEY|CREDENTIALS?)($|_)", re.IGNORECASE)
# Else a host whose cable is pulled is noticed by TCP only, after hours.
_SSH_KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """All that submitting a job does: write ``files``, then run ``argv`` with ``env`` added.

    File names are relative to the run directory, and so are names in ``argv``.
    """

    files: Mapping[str, str]
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSpeedJob:
    """One job for the ``deepspeed`` launcher, on this machine or on the hosts of a hostfile.

    ``hosts`` empty means this machine. ``gpu_ids`` are indices of GPUs to use on this
    machine; empty means the first ``ranks_per_node``. ``extra_env`` is exported on top.
    """

    run_dir: PurePosixPath
    run_id: str
    python: PurePosixPath
    """Interpreter whose ``bin`` folder holds ``deepspeed``."""
    ranks_per_node: int
    device_type: Literal["cuda", "cpu"]
    master_port: int
    omp_num_threads: int
    compute_capability: tuple[int, int] | None = None
    expandable_segments: bool = True
    gpu_ids: tuple[int, ...] = ()
    hosts: tuple[Host, ...] = ()
    worker_module: str = WORKER_MODULE
    has_data: bool = False
    """Whether there is data to tokenise before the ranks start, unless that was done."""
    extra_env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def is_readable_by_jit(arch_list: str) -> bool:
    """Return whether DeepSpeed's JIT can read a ``TORCH_CUDA_ARCH_LIST``."""
    entries = arch_list.strip().replace(" ", ";").split(";")
    return all(_JIT_ARCH.fullmatch(entry) for entry in entries if entry)


def job_environment(job: DeepSpeedJob) -> dict[str, str]:
    """Return the variables that the job sets, beyond those that it inherits.

    Raises:
        SetupError: ``extra_env`` holds a name that is none, or a secret; secrets are
            inherited from the environment and never written to a file.
    """
    env = {
        RUN_ID_VARIABLE: job.run_id,
        "OMP_NUM_THREADS": str(job.omp_num_threads),
        # The folder that the job starts in must not shadow modules: a grp.py or datasets/
        # there would be imported in place of the real one.
        "PYTHONSAFEPATH": "1",
        # A segmentation fault otherwise leaves nothing but a number.
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Ten lines of progress a second would fill the log of a run that takes days.
        "TQDM_MININTERVAL": "1",
    }
    if job.device_type == "cpu":
        # Without it each process of DeepSpeed warns, and would take a GPU where there is one.
        env["DS_ACCELERATOR"] = "cpu"
    else:
        env["DS_ACCELERATOR"] = "cuda"
        if job.compute_capability is not None:
            # Always set: an inherited '9.0a' stops DeepSpeed's JIT, and one architecture
            # builds fastest.
            env["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*job.compute_capability)
        if job.expandable_segments:
            # torch below 2.9 reads only the second name; torch 2.13 reads both
            # (c10/cuda/CUDAAllocatorConfig.h).
            env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
            env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    for name, value in job.extra_env.items():
        if not _IDENTIFIER.fullmatch(name) or "\0" in value:
            raise SetupError(
                f"{name!r} cannot be an environment variable",
                where="environment of the job",
                fix="use letters, digits and underscores",
            )
        if _SECRET.search(name):
            raise SetupError(
                f"{name} looks like a secret, and job.sh is a file that others may read",
                where="environment of the job",
                fix=f"export {name} before starting; the job inherits it",
            )
        env[name] = value
    return env


def deepspeed_argv(job: DeepSpeedJob) -> tuple[str, ...]:
    """Return the ``deepspeed`` command line of a job, unquoted."""
    argv = ["deepspeed"]
    if job.hosts:
        argv += ["--hostfile", str(job.run_dir / HOSTFILE), "--launcher", "pdsh"]
        if len(job.hosts) == 1:
            # Else DeepSpeed runs the ranks here, not on the one host that is named.
            argv.append("--force_multi")
    else:
        # DeepSpeed's default, /job/hostfile, is taken if some container has one; a path that
        # is no regular file means this machine.
        argv += ["--hostfile", "/dev/null"]
        if job.gpu_ids:
            # --num_gpus N means GPUs 0 to N-1 whatever CUDA_VISIBLE_DEVICES says.
            ids = ",".join(map(str, job.gpu_ids))
            argv += ["--include", f"localhost:{ids}"]
        else:
            argv += ["--num_gpus", str(job.ranks_per_node)]
    # Quiet: its information lines, and a warning that there is no hostfile, only confuse.
    argv += ["--master_port", str(job.master_port), "--no_local_rank", "--quiet"]
    return (*argv, "--module", job.worker_module, "--run-dir", str(job.run_dir))


def render_job(job: DeepSpeedJob, *, files: Mapping[str, str]) -> JobRequest:
    """Return the files and the command of a job; pure, so a dry run can print it.

    Args:
        job: what to launch.
        files: the run's other files (recipe, plan, DeepSpeed config) by name.

    Raises:
        RunDirError: the hosts are remote and the path of the run directory holds characters
            that DeepSpeed's remote shell would interpret.
        HostfileError: the hosts have different numbers of slots.
        SetupError: the environment cannot be written to a file.
    """
    env = job_environment(job)
    written = dict(files)
    if job.hosts:
        equal_slots(job.hosts, source=HOSTFILE)
        _check_remote_path(str(job.run_dir))
        written[HOSTFILE] = render_hostfile(job.hosts)
        written[DEEPSPEED_ENV] = _render_deepspeed_env(env)
    written[JOB_SCRIPT] = _render_script(job, env)
    return JobRequest(files=written, argv=("bash", JOB_SCRIPT), env={RUN_ID_VARIABLE: job.run_id})


def _render_script(job: DeepSpeedJob, env: Mapping[str, str]) -> str:
    bin_dir = shlex.quote(str(job.python.parent))
    lines = [
        "#!/usr/bin/env bash",
        "# Written by zerofit; runs without it: bash job.sh",
        "# Secrets such as HF_TOKEN are not here; the job inherits them from your environment.",
        "set -euo pipefail",
        "",
        "# deepspeed, and the ninja that its kernels are built with.",
        f'export PATH={bin_dir}:"$PATH"',
    ]
    if job.hosts:
        lines += [
            "",
            "# DeepSpeed passes on to the hosts what this file names, and PYTHONPATH with the",
            "# folder that it was started in.",
            f"export DS_ENV_FILE={shlex.quote(str(job.run_dir / DEEPSPEED_ENV))}",
            f'export PDSH_SSH_ARGS_APPEND="${{PDSH_SSH_ARGS_APPEND:-}} {_SSH_KEEP_ALIVE}"',
        ]
    lines += ["", f"cd -- {shlex.quote(str(job.run_dir))}"]
    if inherited := env.get("TORCH_CUDA_ARCH_LIST"):
        lines.append(f"# Fixed: DeepSpeed's JIT cannot read values like {inherited}a.")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(env.items())]
    if job.has_data:
        tokenise = (job.python.name, "-m", DATA_MODULE, "--run-dir", str(job.run_dir))
        lines += [
            "",
            "# Tokenise the data that recipe.yaml names, once.",
            f"test -e {DATA_SUMMARY} || {shlex.join(tokenise)} > /dev/null",
        ]
    lines += ["", f"exec {' '.join(_quoted_lines(deepspeed_argv(job)))}"]
    return "\n".join(lines) + "\n"


def _quoted_lines(argv: tuple[str, ...]) -> list[str]:
    """Quote arguments; each option starts a new line."""
    return [("\\\n  " if arg.startswith("--") else "") + shlex.quote(arg) for arg in argv]


def _render_deepspeed_env(env: Mapping[str, str]) -> str:
    """Return the file that DeepSpeed reads variables from: no comments, no blank lines.

    DeepSpeed puts values in double quotes when they hold special characters and hands them to
    a remote shell, so what stays special inside double quotes is escaped here.
    """
    lines = []
    for name, value in sorted(env.items()):
        if "\n" in value or "%" in value:
            raise SetupError(
                f"{name} holds a line break or a percent sign, which pdsh cannot pass on",
                where="environment of the job",
                fix=f"set {name} on the hosts themselves",
            )
        escaped = re.sub(r'([\\"$`])', r"\\\1", value)
        lines.append(f"{name}={escaped}")
    return "\n".join(lines) + "\n"


def _check_remote_path(path: str) -> None:
    if not _SAFE_IN_REMOTE_SHELL.fullmatch(path):
        raise RunDirError(
            "with a hostfile the path passes through a remote shell unquoted, so it must "
            "consist of letters, digits and @ + = : , . / - _",
            where=path,
            fix="choose another folder for the run",
        )
