"""Run one of our modules on every node at once, through ssh or srun, and gather what it prints."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from launcher.dispatch.ssh import explain, python_argv, ssh_argv

# ssh clients at a time: each is a process of about 10 MB.
_MAX_AT_ONCE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a program on one node printed last, or why it printed nothing."""

    host: str
    value: dict[str, Any] | None = None
    problem: str | None = None
    fix: str = ""
    at_seconds: float = 0.0
    """Unix time here when the answer came."""


def run_by_ssh(
    hosts: Sequence[str],
    module: str,
    args_of: Callable[[int], Sequence[str]],
    *,
    timeout_seconds: float,
) -> list[Answer]:
    """Run ``python -m module`` on each host; return the answers in the order of the hosts.

    Args:
        hosts: names that ssh knows.
        module: prints a JSON object as its last line; diagnostics may come before.
        args_of: arguments for the host of an index.
        timeout_seconds: after which a host is given up.
    """
    if not hosts:
        return []

    def run(index: int) -> Answer:
        argv = ssh_argv(hosts[index], python_argv(module, args_of(index)))
        return _run_one(hosts[index], argv, timeout_seconds)

    with ThreadPoolExecutor(max_workers=min(_MAX_AT_ONCE, len(hosts))) as pool:
        return list(pool.map(run, range(len(hosts))))


def run_by_srun(
    module: str, args: Sequence[str], *, nodes: Sequence[str], timeout_seconds: float
) -> tuple[list[dict[str, Any]], str]:
    """Run ``python -m module`` once on each of some nodes of the Slurm allocation that we are in.

    Returns:
        The JSON objects that the nodes printed, and what else was printed, for errors.
    """
    count = len(nodes)
    flags = [f"--nodes={count}", f"--ntasks={count}", f"--nodelist={','.join(nodes)}"]
    flags += ["--ntasks-per-node=1", "--overlap"]
    values: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as stream:
        try:
            process = subprocess.Popen(
                ["srun", *flags, *python_argv(module, args)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            return [], f"cannot start srun: {error.strerror}"
        timer = threading.Timer(timeout_seconds, process.terminate)
        timer.start()
        try:
            process.wait()
        finally:
            timer.cancel()
            process.terminate()
        stream.seek(0)
        said = []
        for line in stream:
            value = _json_object(line)
            if value is None:
                said.append(line.strip())
            else:
                values.append(value)
    return values, "\n".join(said[-5:])


def _run_one(host: str, argv: Sequence[str], timeout_seconds: float) -> Answer:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )
    except OSError as error:
        fix = "apt-get install openssh-client"
        return Answer(host=host, problem=f"cannot start ssh: {error.strerror}", fix=fix)
    except subprocess.TimeoutExpired:
        return Answer(
            host=host,
            problem=f"it has not answered within {timeout_seconds:.0f} s",
            fix=f"try `ssh {host} true`: its shell or its file system may hang",
        )
    arrived = time.time()
    lines = done.stdout.splitlines()
    value = _json_object(lines[-1]) if lines else None
    if value is not None and "problem" not in value:
        return Answer(host=host, value=value, at_seconds=arrived)
    if value is not None:
        return Answer(host=host, problem=str(value["problem"]), fix="mend it there")
    problem, fix = explain([*lines, *done.stderr.splitlines()], host=host)
    return Answer(host=host, problem=problem, fix=fix)


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
