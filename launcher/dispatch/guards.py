"""The launcher's side of the guards: one ssh connection to every host for as long as a job runs."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.dispatch.failure import DeadRank, HostLostError, LostHost
from launcher.dispatch.host_guard import ALIVE_SECONDS
from launcher.dispatch.process_group import KILL_GRACE_SECONDS, TERM_GRACE_SECONDS
from launcher.dispatch.ssh import CONNECT_SECONDS, explain, python_argv, ssh_argv
from launcher.errors import JobFailedError, list_problems
from launcher.hostfile import Host

# Connecting, starting Python on a slow file system, looking around.
HELLO_SECONDS = CONNECT_SECONDS + 5.0
PING_SECONDS = 2.0
# Eight missed signs of life; a host that swaps badly is slower than that, and lost anyway.
SILENT_SECONDS = 8 * ALIVE_SECONDS
# How long a host that hears nothing from here lets the run go on: longer than any pause of
# this process (Ctrl-Z), shorter than anybody waits for a GPU that hangs.
LOST_AFTER_SECONDS = 30.0
_KEPT_LINES = 20
_SPARE_FILES = 256


@dataclass(kw_only=True)
class _Guard:
    host: Host
    process: subprocess.Popen[bytes]
    heard: float
    is_ready: bool = False
    is_gone: bool = False
    problem: str | None = None
    said: list[str] = field(default_factory=list)
    rest: bytes = b""

    def send(self, word: bytes) -> None:
        """Send a word unless the connection is broken or full."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            os.write(self.process.stdin.fileno(), word + b"\n")


@dataclass(kw_only=True)
class Guards:
    """Knows how every rank of a job on several hosts ended, and which hosts were lost."""

    hosts: tuple[Host, ...]
    run_id: str
    run_dir: Path
    master_port: int
    lost_after_seconds: float = LOST_AFTER_SECONDS
    ended: dict[int, DeadRank] = field(default_factory=dict)
    """In the order in which they ended."""
    lost: list[LostHost] = field(default_factory=list)
    _guards: list[_Guard] = field(default_factory=list)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _pinged: float = 0.0

    def start(self) -> None:
        """Connect to all hosts at once and return when every one of them is ready.

        Raises:
            JobFailedError: names each host that cannot take part and why; all connections are
                closed then. A HostLostError where they cannot be reached.
        """
        _allow_open_files(2 * len(self.hosts) + _SPARE_FILES)
        for host in self.hosts:
            self._guards.append(self._connect(host))
        deadline = time.monotonic() + HELLO_SECONDS
        while time.monotonic() < deadline:
            self.wait(0.1)
            if all(guard.is_ready or guard.is_gone for guard in self._guards):
                break
        problems = list(filter(None, map(self._why_not, self._guards)))
        if problems:
            self.end(at_once=True)
            self.close()
            text = list_problems(f"{name}: {problem}" for name, problem, _ in problems)
            fix = problems[0][2]
            if any(guard.problem for guard in self._guards):
                raise JobFailedError(text, where="hosts", fix=fix)
            hosts = tuple(name for name, *_ in problems)
            raise HostLostError(text, where="hosts", fix=fix, hosts=hosts)

    @property
    def has_failure(self) -> bool:
        """Whether a rank is known to have ended badly."""
        return any(dead.exit_status for dead in self.ended.values())

    @property
    def all_ended(self) -> bool:
        """Whether there were ranks and none is left."""
        return len(self.ended) == sum(host.slots for host in self.hosts)

    def look(self) -> None:
        """Take in what the hosts have said, and note hosts that say nothing."""
        self._read(0.0)
        now = time.monotonic()
        if now - self._pinged >= PING_SECONDS:
            self._pinged = now
            for guard in self._guards:
                guard.send(b"ping")
        for guard in self._guards:
            if guard.is_ready and not guard.is_gone and now - guard.heard > SILENT_SECONDS:
                guard.is_gone = True
                self.lost.append(
                    LostHost(
                        host=guard.host.name,
                        problem=f"it has not answered for {now - guard.heard:.0f} s",
                        fix=f"check whether {guard.host.name} is up and on the network",
                    )
                )

    def wait(self, seconds: float) -> None:
        """Sleep, but wake up when a host says something, and take it in."""
        self._read(seconds)
        self.look()

    def end(self, *, at_once: bool) -> bool:
        """End the run on every host that can be reached; return whether nothing is left there."""
        reachable = [guard for guard in self._guards if not guard.is_gone]
        for guard in reachable:
            guard.send(b"kill" if at_once else b"end")
        grace = KILL_GRACE_SECONDS + (0 if at_once else TERM_GRACE_SECONDS) + 2
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and not all(guard.is_gone for guard in reachable):
            self._read(0.1)
        return all(guard.is_gone and guard.problem is None for guard in reachable)

    def close(self) -> None:
        """Close the connections; a host that was not told ends the run by itself."""
        for guard in self._guards:
            guard.process.kill()
            guard.process.wait()
            for stream in (guard.process.stdin, guard.process.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):
                    stream.close()
        self._selector.close()

    def _connect(self, host: Host) -> _Guard:
        args = ["--run-id", self.run_id, "--run-dir", str(self.run_dir)]
        args += ["--master-port", str(self.master_port)]
        args += ["--lost-after", str(self.lost_after_seconds)]
        args += ["--is-master"] if host is self.hosts[0] else []
        process = subprocess.Popen(
            ssh_argv(host.name, python_argv("launcher.dispatch.host_guard", args)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C and Ctrl-Z in the terminal come to the launcher alone.
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        for stream in (process.stdin, process.stdout):
            os.set_blocking(stream.fileno(), False)
        guard = _Guard(host=host, process=process, heard=time.monotonic())
        self._selector.register(process.stdout, selectors.EVENT_READ, guard)
        return guard

    def _read(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            guard: _Guard = key.data
            try:
                chunk = os.read(key.fd, 2**16)
            except BlockingIOError:
                continue
            guard.heard = time.monotonic()
            *lines, guard.rest = (guard.rest + chunk).split(b"\n")
            for line in lines:
                self._take(guard, line.decode("utf-8", errors="replace"))
            if not chunk:
                self._selector.unregister(key.fileobj)
                self._note_end(guard)

    def _take(self, guard: _Guard, line: str) -> None:
        event = _event(line)
        if event is None:
            guard.said = [*guard.said, line][-_KEPT_LINES:]
        elif event["event"] == "hello":
            guard.is_ready, guard.problem = True, event["problem"]
        elif event["event"] == "ended":
            rank = event["rank"]
            self.ended[rank] = DeadRank(
                rank=rank,
                exit_status=event["exit_status"],
                host=guard.host.name,
                is_oom_kill=event["is_oom_kill"],
            )
        elif event["event"] == "gone":
            guard.is_gone = True
            if event["left"]:
                guard.problem = f"processes {event['left']} do not end"

    def _note_end(self, guard: _Guard) -> None:
        """The connection has ended; unless the guard said goodbye, the host is lost."""
        if not guard.is_gone and guard.is_ready:
            problem, fix = explain(guard.said or ["Connection reset"], host=guard.host.name)
            self.lost.append(LostHost(host=guard.host.name, problem=problem, fix=fix))
        guard.is_gone = True

    def _why_not(self, guard: _Guard) -> tuple[str, str, str] | None:
        name = guard.host.name
        if guard.problem is not None:
            fix = "start it again, which takes another port"
            if not guard.problem.startswith("port "):
                fix = "choose a folder that all hosts share: --output-dir"
            return name, guard.problem, fix
        if guard.is_ready:
            return None
        if guard.is_gone:
            return name, *explain(guard.said, host=name)
        return (
            name,
            f"it accepted the connection and has not answered within {HELLO_SECONDS:.0f} s",
            f"try `ssh {name} true`: its shell or its file system may hang",
        )


def _event(line: str) -> dict[str, Any] | None:
    """Return a guard's message, or None for what a login shell or ssh printed."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) and "event" in value else None


def _allow_open_files(number: int) -> None:
    """Raise ``ulimit -n`` of this process as far as it takes and is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))
