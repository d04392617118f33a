"""Slurm's daemons on the nodes of a running job: which of them do not answer.

Slurm itself says so only after ``SlurmdTimeout`` (300 s by default), of which it lets a third pass
before it looks. ``sstat`` asks the daemons of a job's nodes now; every user may, for his own jobs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO

from launcher.dispatch import slurm_commands as slurm

ASK_SECONDS = 5.0
"""One that refuses is known 6 s later (Slurm 22.05 with TCPTimeout 2 s): after 11 s in all."""
# RESPONSE_FORWARD_FAILED (src/common/slurm_protocol_defs.h): no answer from that node.
_NO_ANSWER = re.compile(r"unknown return given from (\S+): 9001\b")


def parse_silent(said: Iterable[str]) -> frozenset[str]:
    """Return the nodes that have not answered, from what sstat wrote as errors."""
    return frozenset(match[1] for line in said if (match := _NO_ANSWER.search(line)))


def parse_answering(shown: Iterable[str]) -> frozenset[str]:
    """Return the nodes that have answered, from sstat's ``step|nodes`` lines.

    A step of which one node is silent has no line; and no step has the nodes that a job has lost.
    """
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet

    found = NodeSet(resolver=RESOLVER_NOGROUP)
    for line in shown:
        found.update(NodeSet(line.strip().partition("|")[2], resolver=RESOLVER_NOGROUP))
    return frozenset(found)


@dataclass(kw_only=True)
class Daemons:
    """Asks again and again, without ever waiting for an answer."""

    job_id: str
    silent: frozenset[str] = frozenset()
    """Names of nodes, as Slurm has them."""
    _steps: tuple[str, ...] = ()
    _process: subprocess.Popen[bytes] | None = None
    _errors: IO[str] | None = None
    _shown: IO[str] | None = None
    _asked: float = field(default=0.0)
    _cannot: bool = False

    def look(self, now: float) -> bool:
        """Ask if it is time to, take in an answer that has come; return whether one has.

        Args:
            now: seconds of a clock that never jumps.
        """
        if self._process is None:
            if now - self._asked >= ASK_SECONDS and not self._cannot:
                self._ask(now)
            return False
        if self._process.poll() is None:
            return False
        assert self._errors is not None
        assert self._shown is not None
        self._errors.seek(0)
        self.silent = parse_silent(self._errors)
        self._shown.seek(0)
        self._steps = tuple(self._shown)
        self.close()
        return True

    def answering(self) -> frozenset[str]:
        """Return the nodes that have answered; of others that are not silent nothing is known."""
        return parse_answering(self._steps)

    @property
    def is_asking(self) -> bool:
        """Whether an answer is awaited."""
        return self._process is not None

    def close(self) -> None:
        """End what is still being asked."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for file in filter(None, (self._errors, self._shown)):
            file.close()
        self._errors = self._shown = None

    def _ask(self, now: float) -> None:
        self._asked = now
        # Files and not pipes, which thousands of nodes could fill while nobody reads; read and
        # closed when the answer has come.
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._shown = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        what = ["--allsteps", "--noheader", "--parsable2", "--format=JobID,Nodelist"]
        argv = ["sstat", *what, "--jobs", self.job_id]
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=self._shown,
                stderr=self._errors,
                env=slurm.own_environment(),
            )
        except OSError:
            # Without sstat Slurm's own time-out has to do, as docs/slurm.md says.
            self._cannot = True
            self.close()
