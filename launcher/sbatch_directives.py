"""The #SBATCH lines of a job script, each setting checked and quoted as Slurm reads it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from launcher.checkpoint_time import STEP_FACTOR, save_seconds
from launcher.errors import LauncherError, RunDirError, SetupError, list_problems
from launcher.recipe_sections import SlurmSection

# The script depends on these; a second value for one would break it in silence.
_OURS = {
    "--array": "-a", "--chdir": "-D", "--nodes": "-N", "--ntasks": "-n", "--ntasks-per-node": "",
    "--output": "-o", "--error": "-e", "--open-mode": "", "--wrap": "", "--parsable": "",
    "--gpus": "-G", "--gpus-per-node": "", "--gpus-per-task": "", "--signal": "",
    "--job-name": "-J", "--gres": "", "--time": "-t", "--requeue": "", "--no-requeue": "",
    "--export": "", "--test-only": "",
}  # fmt: skip
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|infinite|unlimited", re.I)

# Start of the ranks, compilation of DeepSpeed's kernels (44 s each), loading the model.
START_SECONDS = 900
_ROUND_MINUTES = 15
# Slurm's timer looks once a minute (sbatch(1), --signal: up to 60 seconds early).
_SIGNAL_RESOLUTION_SECONDS = 60


def suggest_time_limit_minutes(num_steps: int, step_seconds: float) -> int:
    """Return a time limit for a run of so many optimizer steps, in whole quarters of an hour."""
    # Slurm kills what is late, while a limit that is too long only makes the job wait for a
    # larger gap.
    minutes = (START_SECONDS + STEP_FACTOR * num_steps * step_seconds) / 60
    return math.ceil(minutes / _ROUND_MINUTES) * _ROUND_MINUTES


def suggest_signal_seconds(write_seconds: float, step_seconds: float) -> int:
    """Return how long before the time limit the ranks must hear of it to save a checkpoint.

    Slurm's own words are "up to 60 seconds earlier"; see :mod:`launcher.checkpoint_time`.
    """
    needed = save_seconds(write_seconds, step_seconds=step_seconds)
    return _SIGNAL_RESOLUTION_SECONDS + max(60, math.ceil(needed))


def looks_at_nodes(settings: SlurmSection) -> bool:
    """Return whether the job looks at its nodes before its ranks start.

    In a container not: srun, which the look needs, is outside of it.
    """
    return settings.preflight is not False and settings.container is None


def minutes_of(time: str) -> float | None:
    """Return a time limit of sbatch and sinfo in minutes; ``None`` when there is none.

    Source: sbatch(1), ``--time``: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes, days-hours:minutes:seconds.
    """
    if not _TIME.fullmatch(time) or time.lower() in ("infinite", "unlimited"):
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = [(0, *parts, 0), (0, *parts), tuple(parts)][len(parts) - 1]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def directive(name: str, value: str | int | None = None) -> str:
    """Return one #SBATCH line; the value is quoted, and no shell reads it.

    Source: Slurm 22.05 src/sbatch/opt.c, _get_argument: double quotes keep spaces and ``#``,
    a backslash takes the next character as it is.
    """
    if value is None:
        return f"#SBATCH --{name}"
    text = str(value)
    if not re.fullmatch(r"[\w@%+=:,./\[\]*&|-]+", text, re.ASCII):
        text = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return f"#SBATCH --{name}={text}"


def directives(  # noqa: PLR0913  one for each fact that Slurm asks for
    settings: SlurmSection,
    *,
    name: str,
    run_dir: PurePosixPath,
    log: str,
    num_nodes: int,
    ranks_per_node: int,
    has_gpus: bool,
    signal_seconds: int,
    time_limit_minutes: int | None,
) -> list[str]:
    """Return the #SBATCH lines of a job.

    Raises:
        SetupError: settings that cannot stand there, or contradict the plan; all are listed.
        RunDirError: the run directory's path cannot stand there.
    """
    _check_path(run_dir, is_mounted=settings.container is not None)
    if problems := list(_problems(settings, name=name, ranks_per_node=ranks_per_node)):
        raise SetupError(
            list_problems(problems),
            where="slurm settings (recipe and site file)",
            fix="correct the keys named above",
        )
    lines = [
        directive("job-name", name),
        directive("chdir", str(run_dir)),
        directive("output", log),
        directive("open-mode", "append"),
        directive("nodes", num_nodes + (settings.spare_nodes or 0)),
        directive("ntasks-per-node", ranks_per_node),
    ]
    if has_gpus:
        gres = _gres_with_count(settings.gres, ranks_per_node) if settings.gres else None
        lines.append(directive("gres", gres) if gres else _gpus_per_node(ranks_per_node))
    time = settings.time or time_limit_minutes
    requeue = settings.requeue is not False
    named = {
        "cpus-per-task": settings.cpus_per_task,
        "mem": settings.mem,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": time,
        # B: to the script alone, which passes it on to the ranks.
        "signal": f"B:USR1@{settings.signal_seconds or signal_seconds}",
    }
    lines += [directive(key, value) for key, value in named.items() if value is not None]
    lines += [directive("exclusive")] if settings.exclusive else []
    lines.append(directive("requeue" if requeue else "no-requeue"))
    for option in settings.extra:
        key, equals, value = option.removeprefix("--").partition("=")
        lines.append(directive(key, value if equals else None))
    return lines


def _gpus_per_node(count: int) -> str:
    return directive("gpus-per-node", count)


def _problems(settings: SlurmSection, *, name: str, ranks_per_node: int) -> Iterator[str]:
    texts = {
        "job_name": name,
        **{
            key: getattr(settings, key)
            for key in ("partition", "account", "qos", "constraint", "gres", "mem", "time")
        },
    }
    for key, value in texts.items():
        if value is not None and not (value.strip() and value.isprintable()):
            yield f"slurm.{key} is {value!r}: it needs characters that can be printed on one line"
    if settings.time is not None and not _TIME.fullmatch(settings.time):
        yield (
            f"slurm.time is {settings.time!r}: write minutes, H:MM:SS, D-HH or D-HH:MM:SS "
            "(quoted, or YAML makes a number of it)"
        )
    if settings.gres is not None and _gres_with_count(settings.gres, ranks_per_node) is None:
        yield (
            f"slurm.gres is {settings.gres!r} and the plan has {ranks_per_node} GPUs on each "
            "node: change one of them"
        )
    if (settings.spare_nodes or 0) < 0:
        yield f"slurm.spare_nodes is {settings.spare_nodes}: write 0 or more"
    elif settings.spare_nodes and not looks_at_nodes(settings):
        yield "slurm.spare_nodes is set, and nothing looks for bad nodes (slurm.preflight)"
    for option in settings.extra:
        yield from _extra_problems(option)
    yield from _container_problems(settings)


def _extra_problems(option: str) -> Iterator[str]:
    key = option.partition("=")[0]
    if not option.isprintable() or not re.fullmatch(r"--[a-z][a-z-]*", key):
        yield f"slurm.extra holds {option!r}: write --option or --option=value, one each"
    elif key in _OURS:
        yield f"slurm.extra holds {key}, which zerofit writes itself"
    elif ours := next((name for name in _OURS if name.startswith(key)), None):
        # sbatch reads options with getopt_long, which takes any beginning that is unique.
        yield f"slurm.extra holds {key}, which sbatch would take for {ours}: write it out"
    elif "--clusters".startswith(key):
        yield f"slurm.extra holds {key}: submit on a login node of that cluster instead"


def _container_problems(settings: SlurmSection) -> Iterator[str]:
    if settings.container is None:
        for key in ("container_runtime", "container_mounts"):
            if getattr(settings, key):
                yield f"slurm.{key} is set, and slurm.container names no image"
        return
    if settings.preflight:
        yield "slurm.preflight cannot look at nodes from within slurm.container: leave it out"
    if settings.container_runtime is None:
        yield "slurm.container_runtime is missing: say pyxis or apptainer"
    for mount in settings.container_mounts:
        if not re.fullmatch(r"/[^:,\n]*(:/[^:,\n]*(:[a-z]+)?)?", mount):
            yield f"slurm.container_mounts holds {mount!r}: write /source:/target"


def _gres_with_count(gres: str, gpus_per_node: int) -> str | None:
    """Return gres with the number of GPUs, or ``None`` when it names another number or no GPUs."""
    parts = gres.split(",")
    for index, part in enumerate(parts):
        fields = part.split(":")
        if fields[0] != "gpu":
            continue
        if not fields[-1].isdigit():
            parts[index] = f"{part}:{gpus_per_node}"
        elif int(fields[-1]) != gpus_per_node:
            return None
        return ",".join(parts)
    return None


def _check_path(run_dir: PurePosixPath, *, is_mounted: bool) -> None:
    text = str(run_dir)
    problem: LauncherError | None = None
    if not text.isprintable():
        problem = RunDirError(
            "a line break or control character cannot stand in an #SBATCH line",
            where=repr(text),
            fix="choose another folder for the run",
        )
    elif "%" in text or "\\" in text:
        problem = RunDirError(
            "Slurm takes a percent sign or backslash in the path for a pattern",
            where=text,
            fix="choose another folder for the run",
        )
    elif is_mounted and (":" in text or "," in text):
        problem = RunDirError(
            "pyxis and apptainer take a colon or comma in the path for the end of a mount",
            where=text,
            fix="choose another folder for the run, or leave slurm.container out",
        )
    if problem is not None:
        raise problem
