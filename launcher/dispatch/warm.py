"""Backend ``local`` without its start-up time: ranks forked from a process that is ready.

For many short runs on one machine. ``launcher.worker.fork_server`` has imported the training
stack; the job's files, its environment and how it is watched are those of the local backend.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from launcher import run_dir as rd
from launcher.dispatch.base import Backend, JobHandle, write_files, write_handle
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.local import LocalBackend
from launcher.dispatch.rank_watch import RankWatch
from launcher.dispatch.watch import watch
from launcher.errors import SetupError
from launcher.job_script import RUN_ID_VARIABLE, DeepSpeedJob, JobRequest, job_environment
from launcher.planning.plan import Plan
from launcher.strategy import needs_bitsandbytes

SERVER_MODULE = "launcher.worker.fork_server"
_READY_SECONDS = 300.0
"""For importing the stack from a slow network disk."""


@dataclass(kw_only=True)
class ForkedJob:
    """A job of the fork server, with the part of ``Popen`` that watching needs."""

    pid: int
    rank_pids: tuple[int, ...]
    returncode: int | None = None
    server: ForkServer = field(repr=False)

    def poll(self) -> int | None:
        """Return how the job ended, ``None`` while it runs."""
        if self.returncode is None:
            self._read(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the job's end.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self.returncode is None:
            self._read(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(SERVER_MODULE, timeout or 0)
        return self.returncode

    def _read(self, timeout: float | None) -> None:
        answer = self.server.read_answer(timeout)
        if answer is not None:
            # Without an exit code the server itself has gone.
            self.returncode = int(answer.get("exit_code", 1))


@dataclass(kw_only=True)
class ForkServer:
    """The process that forks ranks, started when it is first needed."""

    log_file: Path
    """What it prints, import errors above all."""
    has_bitsandbytes: bool
    """Whether its ranks can use bitsandbytes; they then have to import more by themselves."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _env: Mapping[str, str] = field(default_factory=dict, repr=False)
    _unread: bytes = field(default=b"", repr=False)

    def close(self) -> None:
        """End the process; a job of it would have been ended by whoever watches it."""
        if self._process is None:
            return
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def fork(
        self, run_dir: Path, env: Mapping[str, str], places: list[dict[str, str]]
    ) -> ForkedJob:
        """Start the ranks of a job.

        Args:
            run_dir: with all files of the job.
            env: the job's variables; the server is started anew when others than the run's
                marker change, because libraries read them when they are imported.
            places: each rank's own variables.

        Raises:
            SetupError: the training stack cannot be imported, or not without touching a GPU.
        """
        fixed = {name: value for name, value in env.items() if name != RUN_ID_VARIABLE}
        if self._process is None or self._process.poll() is not None or fixed != self._env:
            self.close()
            self._start(fixed)
        assert self._process is not None
        assert self._process.stdin is not None
        request = {"run_dir": str(run_dir), "env": dict(env), "places": places}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        answer = self.read_answer(_READY_SECONDS)
        if answer is None or "pid" not in answer:
            raise self._broken("it does not answer")
        pids = tuple(map(int, answer["rank_pids"]))
        return ForkedJob(pid=int(answer["pid"]), rank_pids=pids, server=self)

    def read_answer(self, timeout: float | None) -> dict[str, Any] | None:
        """Return the next answer; ``None`` when none comes in time, empty when it has gone."""
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([stream], [], [], left)[0]:
                return None
            chunk = os.read(stream.fileno(), 2**16)
            if not chunk:
                return {}
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def _start(self, env: Mapping[str, str]) -> None:
        self._env, self._unread = dict(env), b""
        flags = [] if self.has_bitsandbytes else ["--without-bitsandbytes"]
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            # Its own session: Ctrl-C comes to us alone.
            self._process = subprocess.Popen(
                [sys.executable, "-m", SERVER_MODULE, *flags],
                env={**os.environ, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        answer = self.read_answer(_READY_SECONDS)
        if answer != {"ready": True}:
            raise self._broken(str((answer or {}).get("error", "it ended, or did not get ready")))

    def _broken(self, problem: str) -> SetupError:
        if self._process is not None:
            self._process.kill()
        self.close()
        return SetupError(
            f"ranks cannot be forked: {problem}",
            where=str(self.log_file),
            fix="leave --warm out: each case then starts its own processes",
        )


class ForkServers:
    """Fork servers for jobs with and without bitsandbytes and expandable segments.

    Libraries read that when they are imported, hence servers of their own. A context manager.
    """

    def __init__(self, log_file: Path) -> None:
        self._servers = {
            (has, expandable): ForkServer(log_file=log_file, has_bitsandbytes=has)
            for has in (False, True)
            for expandable in (False, True)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for server in self._servers.values():
            server.close()

    def warmed(self, backend: Backend, plan: Plan) -> Backend:
        """Return a backend that forks this plan's ranks, or the given one for other machines."""
        # Not isinstance: the backend for a hostfile's hosts is built on the local one.
        if type(backend) is not LocalBackend:
            return backend
        is_needed = needs_bitsandbytes(plan.workload.method, plan.strategy)
        server = self._servers[is_needed, plan.strategy.expandable_segments]
        return WarmBackend(local=backend, plan=plan, server=server)


@dataclass(kw_only=True)
class WarmBackend:
    """Runs one job with forked ranks; made by :meth:`ForkServers.warmed`."""

    local: LocalBackend
    plan: Plan
    server: ForkServer
    name: str = "local"
    _process: ForkedJob | None = field(default=None, repr=False)

    def check_place(self, plan: Plan) -> None:
        """As the local backend."""
        self.local.check_place(plan)

    def render(self, plan: Plan, *, run_dir: Path, files: Mapping[str, str]) -> JobRequest:
        """As the local backend: ``bash job.sh`` runs the same job the usual way."""
        return self.local.render(plan, run_dir=run_dir, files=files)

    def submit(self, request: JobRequest, *, run_dir: Path) -> JobHandle:
        """Write the files and fork the ranks.

        Raises:
            RunDirError: the files cannot be written.
            SetupError: the training stack cannot be imported.
        """
        write_files(request, run_dir)
        job = self.local.job(self.plan, run_dir)
        rd.write_status(run_dir, "running")
        env = job_environment(job)
        if job.gpu_ids:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, job.gpu_ids))
        self._process = self.server.fork(run_dir, env, _places(job))
        handle = JobHandle(
            backend=self.name,
            run_dir=run_dir,
            run_id=job.run_id,
            job_id=str(self._process.pid),
            host=socket.gethostname(),
            session_id=self._process.pid,
            master_port=job.master_port,
        )
        write_handle(handle)
        return handle

    def wait(
        self, handle: JobHandle, *, interruptions: Interruptions, console: BinaryIO | None
    ) -> None:
        """As the local backend."""
        assert self._process is not None, "wait() follows submit()"
        ranks = RankWatch(run_id=handle.run_id, session_id=handle.session_id)
        ranks.know(self._process.rank_pids)
        watch(self._process, handle, ranks, interruptions=interruptions, console=console)


def _places(job: DeepSpeedJob) -> list[dict[str, str]]:
    """Return the variables by which each rank finds the others, as DeepSpeed's launcher sets."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(job.master_port),
        "WORLD_SIZE": str(job.ranks_per_node),
        "LOCAL_SIZE": str(job.ranks_per_node),
    }
    ranks = map(str, range(job.ranks_per_node))
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ranks]
