"""What a backend runs: the files of a job and the text of ``job.sh``, which needs no zerofit."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Literal

from launcher.errors import RunDirError, SetupError
from launcher.hostfile import Host, equal_slots, render_filter, render_hostfile
from launcher.redact import SECRET_NAME

JOB_SCRIPT = "job.sh"
HOSTFILE = "hostfile"
HOST_ENVIRONMENT = "environment.sh"
"""Variables of the ranks on other hosts: written by job.sh, readable by its owner alone."""
RANK_SCRIPT = "rank.sh"
"""One rank under ``mpirun``."""
RUN_ID_VARIABLE = "ZEROFIT_RUN_ID"
"""Marks every process of a run, so that none is left behind when it ends."""
WORKER_MODULE = "launcher.worker.train"
DATA_MODULE = "launcher.worker.data"
DATA_SUMMARY = "data/summary.json"
"""Exists when the data module has done its work."""
BY_HAND_MODULE = "launcher.by_hand"

# What DeepSpeed's JIT reads (0.19.8 ops/op_builder/builder.py, compute_capability_args): it
# calls int() on both sides of the dot, so torch's '9.0a', 'native' or 'Hopper' stop the build.
_JIT_ARCH = re.compile(r"\d+\.\d+(\+PTX)?")
# DeepSpeed hands these to a remote shell without quotes (0.19.8 launcher/multinode_runner.py).
_SAFE_IN_REMOTE_SHELL = re.compile(r"[\w@+=:,./-]+", re.ASCII)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Else a host whose cable is pulled is noticed by TCP only, after hours.
_SSH_KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
# What other hosts get of the environment that a job is started in: where things are and how to
# reach them. All else stays here.
PASSED_ON = (
    "CUDA_HOME", "CUDA_DEVICE_ORDER", "DS_*", "GLOO_*", "HF_*", "HTTP_PROXY", "HTTPS_PROXY",
    "HUGGING_FACE_HUB_TOKEN", "LD_LIBRARY_PATH", "MLFLOW_*", "NCCL_*", "NO_PROXY", "PYTHONPATH",
    "TORCH_*", "TRITON_*", "UCX_*", "WANDB_*", "XDG_CACHE_HOME", "http_proxy", "https_proxy",
    "no_proxy",
)  # fmt: skip
_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")
HostLauncher = Literal["pdsh", "openmpi"]


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
    host_launcher: HostLauncher = "pdsh"
    pass_env: tuple[str, ...] = ()
    """Variables that other hosts get beside those of ``PASSED_ON``; ``A_*`` is a prefix."""
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
        if SECRET_NAME.search(name):
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
        argv += _host_options(job)
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
    if job.hosts and job.host_launcher == "openmpi":
        return (*argv, "--no_python", str(job.run_dir / RANK_SCRIPT))
    return (*argv, "--module", job.worker_module, "--run-dir", str(job.run_dir))


def _host_options(job: DeepSpeedJob) -> list[str]:
    options = ["--hostfile", str(job.run_dir / HOSTFILE), "--launcher", job.host_launcher]
    # The name that the user gave; by itself DeepSpeed takes the first address of the host.
    options += ["--master_addr", job.hosts[0].name]
    if job.host_launcher == "pdsh":
        # DeepSpeed has the hosts source this file. Values that it passes on itself stand on
        # command lines, which everybody on a host can read; and Ctrl-C makes it run `pkill -f`
        # for all of the user's DeepSpeed jobs on the hosts, with a pattern that this option
        # confines to this run (0.19.8 launcher/multinode_runner.py, cmd_to_search).
        options += ["--venv_script", str(job.run_dir / HOST_ENVIRONMENT)]
    else:
        # Open MPI binds each rank to one core, with all of its threads.
        options += ["--launcher_args", "--bind-to none"]
    if any(host.gpu_ids for host in job.hosts):
        options += ["--include", render_filter(job.hosts)]
    if len(job.hosts) == 1:
        # Else DeepSpeed runs the ranks here, not on the one host that is named.
        options.append("--force_multi")
    return options


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
        if job.host_launcher == "openmpi":
            written[RANK_SCRIPT] = _render_rank_script(job)
    written[JOB_SCRIPT] = _render_script(job, env)
    mark = launcher_mark(job.run_id) if job.hosts else job.run_id
    return JobRequest(files=written, argv=("bash", JOB_SCRIPT), env={RUN_ID_VARIABLE: mark})


def launcher_mark(run_id: str) -> str:
    """Return the mark of processes that start ranks on hosts; the ranks have the run id itself.

    This machine may be one of the hosts, and the two are ended one after the other.
    """
    return f"{run_id}.launcher"


def _render_script(job: DeepSpeedJob, env: Mapping[str, str]) -> str:
    lines = [
        "#!/usr/bin/env bash",
        "# Written by zerofit; runs without it: bash job.sh",
        "# Secrets such as HF_TOKEN are not here; the job inherits them from your environment.",
        "set -euo pipefail",
        "",
        "# deepspeed, and the ninja that its kernels are built with.",
        _path_line(job),
    ]
    lines += ["", f"cd -- {shlex.quote(str(job.run_dir))}", *_by_hand_lines(job)]
    if inherited := env.get("TORCH_CUDA_ARCH_LIST"):
        lines.append(f"# Fixed: DeepSpeed's JIT cannot read values like {inherited}a.")
    exports = dict(env)
    if job.hosts:
        # DeepSpeed's own launch.py sets these two as well, mpirun does not.
        exports |= {"MASTER_ADDR": job.hosts[0].name, "MASTER_PORT": str(job.master_port)}
        # For the hosts alone, below: see launcher_mark.
        del exports[RUN_ID_VARIABLE]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(exports.items())]
    if job.hosts:
        lines += _host_environment_lines(job, exports)
    if job.has_data:
        tokenise = (job.python.name, "-m", DATA_MODULE, "--run-dir", str(job.run_dir))
        lines += [
            "",
            "# Tokenise the data that recipe.yaml names, once.",
            f"test -e {DATA_SUMMARY} || {shlex.join(tokenise)} > /dev/null",
        ]
    lines += ["", f"exec {' '.join(_quoted_lines(deepspeed_argv(job)))}"]
    return "\n".join(lines) + "\n"


def _by_hand_lines(job: DeepSpeedJob) -> list[str]:
    """Return the part of job.sh that has it watched, as `zerofit train` does."""
    program = [job.python.name, "-m", BY_HAND_MODULE, "--run-dir", str(job.run_dir)]
    program += ["--run-id", job.run_id, "--master-port", str(job.master_port)]
    program += ["--on-hosts"] if job.hosts else []
    return [
        "# Started by hand: watched from here on, so that it is not started twice, and that it",
        "# saves a checkpoint when it is told to stop.",
        f'[[ -n "${{{RUN_ID_VARIABLE}:-}}" ]] || exec {shlex.join(program)}',
        "",
    ]


def _path_line(job: DeepSpeedJob) -> str:
    return f'export PATH={shlex.quote(str(job.python.parent))}:"$PATH"'


def _quoted_lines(argv: tuple[str, ...]) -> list[str]:
    """Quote arguments; each option starts a new line."""
    return [("\\\n  " if arg.startswith("--") else "") + shlex.quote(arg) for arg in argv]


def _host_environment_lines(job: DeepSpeedJob, exports: Mapping[str, str]) -> list[str]:
    """Return the part of job.sh that writes what the ranks on other hosts get."""
    for pattern in job.pass_env:
        if not _PATTERN.fullmatch(pattern):
            raise SetupError(
                f"{pattern!r} is not the name of a variable",
                where="cluster.pass_env",
                fix="write names like WANDB_MODE, or prefixes like NCCL_*",
            )
    patterns = sorted({*PASSED_ON, *job.pass_env, *exports})
    return [
        "",
        "# What the hosts get of this environment, and no more. The file may hold secrets, so only",
        "# its owner can read it.",
        f"rm -f {HOST_ENVIRONMENT}",
        f"(umask 077 && echo export {RUN_ID_VARIABLE}={job.run_id} > {HOST_ENVIRONMENT})",
        f"echo {shlex.quote(_path_line(job))} >> {HOST_ENVIRONMENT}",
        "for name in $(compgen -e); do",
        '  case "$name" in',
        f"    {RUN_ID_VARIABLE}) ;;  # stands there; this process has another one",
        "    " + " \\\n    ".join(textwrap.wrap(" | ".join(patterns), 90)) + ")",
        f'      printf \'export %s=%q\\n\' "$name" "${{!name}}" >> {HOST_ENVIRONMENT} ;;',
        "  esac",
        "done",
        "# DeepSpeed would put these on command lines.",
        "unset ${!MLFLOW@}",
        f'export PDSH_SSH_ARGS_APPEND="${{PDSH_SSH_ARGS_APPEND:-}} {_SSH_KEEP_ALIVE}"',
    ]


def _render_rank_script(job: DeepSpeedJob) -> str:
    """Return what mpirun starts; the path was checked, so that any shell takes it as it is."""
    argv = (str(job.python), "-u", "-m", job.worker_module, "--run-dir", str(job.run_dir))
    return (
        "#!/usr/bin/env bash\n"
        "# One rank; started by mpirun, which says which one.\n"
        f"source {job.run_dir / HOST_ENVIRONMENT}\n"
        f"cd {job.run_dir}\n"
        f"exec {shlex.join(argv)}\n"
    )


def _check_remote_path(path: str) -> None:
    if not _SAFE_IN_REMOTE_SHELL.fullmatch(path):
        raise RunDirError(
            "with a hostfile the path passes through a remote shell unquoted, so it must "
            "consist of letters, digits and @ + = : , . / - _",
            where=path,
            fix="choose another folder for the run",
        )
