"""job.sbatch: a run as a Slurm job, and several as an array; the files need no zerofit."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from launcher.job_script import (
    DATA_MODULE,
    DATA_SUMMARY,
    RUN_ID_VARIABLE,
    DeepSpeedJob,
    JobRequest,
    job_environment,
)
from launcher.recipe_sections import SlurmSection
from launcher.sbatch_directives import directive, directives, looks_at_nodes
from launcher.sbatch_parts import (
    ENDING,
    FIRST_PORT,
    IN_ALLOCATION_VARIABLE,
    JOB_SBATCH,
    NEXT_JOB,
    NODES_LEFT,
    NUM_PORTS,
    ONE_TASK,
    ONLY_ONCE,
    RENDEZVOUS,
    REQUEUE,
    REQUEUE_MARKER,
    RESUBMIT,
    SHARING,
    STEPS,
)
from launcher.stop_file import STOP_FILE

LOG = "logs/launcher.log"
NEEDS = "needs.json"
"""What the run needs of each node; read by the job's look at its nodes."""
PREFLIGHT = "preflight.json"
"""What that look found, with the rates that ``zerofit plan --measured`` reads."""
NODES = "nodes"
"""Names of the nodes to use, separated by commas, that the look at them has chosen."""
PREFLIGHT_MODULE = "launcher.dispatch.job_preflight"
NODES_MODULE = "launcher.dispatch.job_nodes"
RECOVERY_MODULE = "launcher.recovery.in_job"
# A rank that inherits these from the shell that submitted would take itself for another one.
_OTHERS_RANKS = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"

RESTART_SECONDS = 45
"""Kept free before the time limit for Slurm to take the next job, with a controller that is busy:
``slurm_commands`` gives it 30 s for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """One run as a Slurm job: one task per GPU, started by ``srun``.

    ``ranks`` says what every rank runs; its hosts, port and GPU indices are Slurm's to choose.
    """

    ranks: DeepSpeedJob
    num_nodes: int
    settings: SlurmSection
    signal_seconds: int
    """How long before the time limit the ranks are told to save and stop."""
    time_limit_minutes: int | None = None
    """Used where the settings name none; ``None`` leaves it to the partition."""
    min_nodes: int | None = None
    """The run goes on with so many nodes when it loses others; ``None``: with all of them."""

    @property
    def name(self) -> str:
        """The job's name in Slurm."""
        return self.settings.job_name or f"zerofit-{self.ranks.run_dir.name}"

    @property
    def may_shrink(self) -> bool:
        """Whether the job goes on when it loses a node."""
        return self.min_nodes is not None and self.num_nodes > 1


def port_of(job_id: int) -> int:
    """Return the port at which the ranks of a job meet, as the script computes it."""
    return FIRST_PORT + job_id % NUM_PORTS


def render_slurm_job(job: SlurmJob, *, files: Mapping[str, str]) -> JobRequest:
    """Return the files of a Slurm job and the command that submits it; pure.

    Raises:
        SetupError: a setting cannot stand in a script, or contradicts the plan.
        RunDirError: the run directory's path cannot.
    """
    script = "\n".join([*_header(job), "", *_body(job)]) + "\n"
    return JobRequest(
        files={**files, JOB_SBATCH: script},
        argv=("sbatch", "--parsable", JOB_SBATCH),
        env={RUN_ID_VARIABLE: job.ranks.run_id},
    )


def render_array(
    jobs: Sequence[SlurmJob], *, folder: PurePosixPath, max_parallel: int | None
) -> JobRequest:
    """Return a script that runs several jobs as one job array, a task each.

    Args:
        jobs: of one shape and with the same settings.
        folder: where the script is written.
        max_parallel: tasks that may run at the same time.

    Raises:
        RunDirError: a path cannot stand in a script.
    """
    first = jobs[0]
    limits = [job.time_limit_minutes for job in jobs]
    longest = None if None in limits else max(limit for limit in limits if limit is not None)
    together = f"%{max_parallel}" if max_parallel else ""
    lines = [
        "#!/usr/bin/env bash",
        "# Written by zerofit; runs without it: sbatch job.sbatch",
        *directives(
            first.settings,
            name=first.settings.job_name or f"zerofit-{folder.name}",
            run_dir=folder,
            log="array-%a.log",
            num_nodes=first.num_nodes,
            ranks_per_node=first.ranks.ranks_per_node,
            has_gpus=first.ranks.device_type == "cuda",
            signal_seconds=max(job.signal_seconds for job in jobs),
            time_limit_minutes=longest,
        ),
        directive("array", f"0-{len(jobs) - 1}{together}"),
        "",
        "set -euo pipefail",
        "runs=(",
        *(f"  {shlex.quote(str(job.ranks.run_dir))}" for job in jobs),
        ")",
        'cd -- "${runs[SLURM_ARRAY_TASK_ID]}"',
        f"exec bash {JOB_SBATCH} >> {LOG} 2>&1",
    ]
    return JobRequest(
        files={JOB_SBATCH: "\n".join(lines) + "\n"}, argv=("sbatch", "--parsable", JOB_SBATCH)
    )


def _header(job: SlurmJob) -> list[str]:
    return [
        "#!/usr/bin/env bash",
        "# Written by zerofit; runs without it: sbatch job.sbatch",
        "# Inside an allocation of the same shape: bash job.sbatch",
        "# Secrets such as HF_TOKEN are not here; the job inherits them from your environment.",
        *directives(
            job.settings,
            name=job.name,
            run_dir=job.ranks.run_dir,
            log=LOG,
            num_nodes=job.num_nodes,
            ranks_per_node=job.ranks.ranks_per_node,
            has_gpus=job.ranks.device_type == "cuda",
            signal_seconds=job.signal_seconds,
            time_limit_minutes=job.time_limit_minutes,
        ),
        *([directive("no-kill")] if job.may_shrink else []),
    ]


def _body(job: SlurmJob) -> list[str]:
    lines = []
    if job.settings.modules:
        # Before `set -u`, which the shell function `module` of some sites does not survive.
        lines += [
            "type module > /dev/null 2>&1 || source /etc/profile",
            f"module load {shlex.join(job.settings.modules)} || exit",
        ]
    lines += ["set -euo pipefail", f"cd -- {shlex.quote(str(job.ranks.run_dir))}", ""]
    lines += [*ONLY_ONCE, *STEPS, *NEXT_JOB]
    lines += [*(RESUBMIT if job.settings.requeue is False else REQUEUE), *_signal(job)]
    lines += [*_environment(job), "", *RENDEZVOUS, "", *_as_many_nodes_as_there_are(job)]
    lines += _preflight(job)
    if job.ranks.has_data:
        tokenise = shlex.join(_program(job, DATA_MODULE))
        where = _node_list(job, "$MASTER_ADDR") + _container_options(job)
        lines += [
            "# Tokenise the data that recipe.yaml names, once and not in every rank.",
            f"if [[ ! -e {DATA_SUMMARY} && ! -e {STOP_FILE} ]]; then",
            f"  run srun {ONE_TASK}{where} \\",
            f"    {tokenise} > /dev/null",
            f'  ((code == 0)) || [[ -e {STOP_FILE} ]] || exit "$code"',
            "fi",
            "",
        ]
    end_keeper = ['[[ -z $keeper ]] || kill "$keeper" 2> /dev/null || true']
    return [*lines, *_ranks(job), *(end_keeper if job.may_shrink else []), *ENDING]


def _signal(job: SlurmJob) -> list[str]:
    """Return what the script does when its time is nearly up."""
    grace = max(15, (job.settings.signal_seconds or job.signal_seconds) - RESTART_SECONDS)
    # Nothing is lost with a tokenisation, and no rank looks for the file meanwhile.
    end_data = f'  [[ -e {DATA_SUMMARY} || -z $step ]] || kill "$step" || true'
    return [
        "# Before the time limit, or a preemption, Slurm sends USR1. The ranks look for `stop`;",
        "# should they not get to save in time, the newest checkpoint has to do.",
        "stop() {",
        '  echo "Slurm says stop: asking the ranks to save a checkpoint"',
        f'  echo "Slurm\'s signal" > {STOP_FILE}',
        *([end_data] if job.ranks.has_data else []),
        f"  (read -rt {grace} <> <(:) || next_job) &",
        "  timer=$!",
        "}",
        "trap stop USR1",
        "",
    ]


def _as_many_nodes_as_there_are(job: SlurmJob) -> list[str]:
    if not job.may_shrink:
        return []
    fit = [*_program(job, RECOVERY_MODULE), "--start", str(job.num_nodes)]
    where = _node_list(job, "$MASTER_ADDR") + _container_options(job)
    return [
        *NODES_LEFT,
        "# A job that comes back may have other nodes than the plan is for (recovery.min_nodes).",
        f'if [[ -e {NODES} ]] || (($(wc -l <<< "$hosts") < {job.num_nodes})); then',
        f"  run srun {SHARING} {ONE_TASK}{where} \\",
        f"    {shlex.join(fit)} --left \"${{hosts//$'\\n'/,}}\"",
        "  if ((code != 0)); then",
        f"    [[ ! -e {REQUEUE_MARKER} ]] || next_job || true",
        '    exit "$code"',
        "  fi",
        "else",
        f'  head -n {job.num_nodes} <<< "$hosts" | paste -sd, > {NODES}',
        "fi",
        f"nodes=$(<{NODES})",
        "MASTER_ADDR=${nodes%%,*}",
        "",
    ]


def _preflight(job: SlurmJob) -> list[str]:
    if not looks_at_nodes(job.settings):
        said = "not looking at the nodes first: srun cannot be called from within a container"
        return [] if job.settings.preflight is False else [f'echo "{said}"', ""]
    look = [str(_python(job)), "-m", PREFLIGHT_MODULE, "--run-dir", str(job.ranks.run_dir)]
    there_are = '"$(tr , "\\n" <<< "$nodes" | wc -l)"'
    num_nodes = there_are if job.may_shrink else job.num_nodes
    counts = f"--num-nodes {num_nodes} --ranks-per-node {job.ranks.ranks_per_node}"
    return [
        "# A bad node is named now, and not by a time-out in half an hour (slurm.preflight).",
        f"run {shlex.join(look)} {counts}",
        f"if [[ ! -e {STOP_FILE} ]]; then",
        '  ((code == 0)) || exit "$code"',
        f"  nodes=$(<{NODES})",
        "  MASTER_ADDR=${nodes%%,*}",
        "fi",
        "",
    ]


def _node_list(job: SlurmJob, nodes: str) -> str:
    is_known = looks_at_nodes(job.settings) or job.may_shrink
    return f' --nodelist="{nodes}"' if is_known else ""


def _environment(job: SlurmJob) -> list[str]:
    ranks = job.ranks
    env = {**job_environment(ranks), "LOCAL_SIZE": str(ranks.ranks_per_node)}
    # Slurm knows how many cores a rank has.
    del env["OMP_NUM_THREADS"]
    lines = [
        "# What another launcher left in the environment must not reach the ranks.",
        f"unset {_OTHERS_RANKS}",
    ]
    if job.settings.container is None:
        bin_dir = shlex.quote(str(_python(job).parent))
        if _python(job).is_absolute():
            lines.append(f'export PATH={bin_dir}:"$PATH"  # the ninja that kernels are built with')
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(env.items())]
    return [
        *lines,
        'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"',
        "# Since Slurm 22.05 srun does not take it over from sbatch.",
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
    ]


def _ranks(job: SlurmJob) -> list[str]:
    per_node = job.ranks.ranks_per_node
    # The job's own number of tasks counts those of spare nodes.
    shape = f"--nodes={job.num_nodes} --ntasks={job.num_nodes * per_node}"
    name = shlex.quote(step_name(job.ranks.run_id))
    left, left_option, sharing = [], "", ""
    if job.may_shrink:
        sharing, left_option = f"{SHARING} ", ' --left "$left"'
        shape = f"{sharing}--nodes=${{#each[@]}} --ntasks=$((${{#each[@]}} * {per_node}))"
        left = ["    left=$(nodes_left)", "    MASTER_ADDR=${left%%,*}"]
    shape += f" --ntasks-per-node={per_node}"
    before, after = _around_ranks(job)
    where = _node_list(job, "$MASTER_ADDR") + _container_options(job)
    goes_on = f"! -e {STOP_FILE} && ! -e {REQUEUE_MARKER} && -z ${{{IN_ALLOCATION_VARIABLE}:-}}"
    return [
        "# One task per GPU; when one fails, Slurm ends the others.",
        "ranks() {",
        *before,
        f"  run srun {shape}{_node_list(job, '$nodes')} --kill-on-bad-exit=1 --label \\",
        f"    --job-name={name}{_container_options(job)} \\",
        f"    {shlex.join(_program(job, job.ranks.worker_module))}",
        *after,
        "}",
        f"if [[ ! -e {STOP_FILE} ]]; then",
        "  ranks",
        "  # What follows from a failure: another start here, perhaps with a plan that needs less",
        "  # memory, or the end with a status that says why (recovery.max_attempts).",
        f"  while ((code != 0)) && [[ {goes_on} ]]; do",
        *left,
        f"    run srun {sharing}{ONE_TASK}{where} \\",
        f"      {shlex.join(_program(job, RECOVERY_MODULE))}{left_option}",
        "    ((code == 0)) || break",
        "    ranks",
        "  done",
        "else",
        f"  code=0; touch {REQUEUE_MARKER}  # nothing has run",
        "fi",
    ]


def _around_ranks(job: SlurmJob) -> tuple[list[str], list[str]]:
    """Return what a job that may shrink does before and after its ranks."""
    if not job.may_shrink:
        return [], []
    before = [
        f"  nodes=$(<{NODES})",
        "  MASTER_ADDR=${nodes%%,*}",
        '  IFS=, read -ra each <<< "$nodes"',
        "  keep",
    ]
    if job.settings.container is not None:
        return before, []
    watch = [str(_python(job)), "-m", NODES_MODULE, "--run-dir", str(job.ranks.run_dir)]
    watch += ["--step", step_name(job.ranks.run_id)]
    before += [f"  {shlex.join(watch)} < /dev/null &", "  watch=$!"]
    return before, ['  kill "$watch" 2> /dev/null || true']


def step_name(run_id: str) -> str:
    """Return the name of the ranks' step, by which it is found again."""
    return f"zerofit-{run_id}"


def _python(job: SlurmJob) -> PurePosixPath:
    if job.settings.python is not None:
        return PurePosixPath(job.settings.python)
    return PurePosixPath("python3") if job.settings.container else job.ranks.python


def _program(job: SlurmJob, module: str) -> list[str]:
    """Return the command that runs a module, in the container if there is one."""
    program = [str(_python(job)), "-m", module, "--run-dir", str(job.ranks.run_dir)]
    settings = job.settings
    if settings.container is None or settings.container_runtime != "apptainer":
        return program
    binds = [word for mount in _mounts(job) for word in ("--bind", mount)]
    nvidia = ["--nv"] if job.ranks.device_type == "cuda" else []
    return ["apptainer", "exec", *nvidia, *binds, settings.container, *program]


def _container_options(job: SlurmJob) -> str:
    """Return srun's options for pyxis, Slurm's container plugin; empty for anything else."""
    settings = job.settings
    if settings.container is None or settings.container_runtime == "apptainer":
        return ""
    options = {
        "--container-image": settings.container,
        "--container-mounts": ",".join(_mounts(job)),
        "--container-workdir": str(job.ranks.run_dir),
    }
    return "".join(f" \\\n    {name}={shlex.quote(value)}" for name, value in options.items())


def _mounts(job: SlurmJob) -> list[str]:
    run_dir = str(job.ranks.run_dir)
    return [f"{run_dir}:{run_dir}", *job.settings.container_mounts]
