"""Start probes through Slurm, and wait for what is expected of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host_processes import WAIT_SECONDS, HostProcess
from virtual_hosts import ROOT, VirtualCluster

from launcher import run_dir as rd

TINY = """\
model: {name_or_path: smollm2-135m, random_weights: true}
max_seq_len: 64
optim: {max_steps: 2}
cluster: {num_nodes: 2, gpus_per_node: 1, backend: slurm}
"""
HERE = Path(__file__).resolve().parent


@dataclass(kw_only=True)
class SlurmRuns:
    """Starts probes and the commands of zerofit on the login node."""

    cluster: VirtualCluster
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        return {"PYTHONPATH": f"{ROOT}:{HERE}", "XDG_CONFIG_HOME": str(self.folder), **more}

    def submit(self, name: str, probe: str = "finish", **settings: Any) -> Path:
        """Submit a probe and return its run directory; capitals are variables, not settings."""
        done = self._driver(self.cluster.run, name, probe, "submit", settings)
        assert done.returncode == 0, done.stderr
        return self.folder / name

    def wait(
        self, name: str, probe: str = "finish", **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a probe to its end, as `zerofit train` does."""
        done = self._driver(self.cluster.run, name, probe, "wait", settings)
        assert isinstance(done, subprocess.CompletedProcess)
        return done

    def start(self, name: str, probe: str, **settings: Any) -> HostProcess:
        """Start the same, and return when all ranks run."""
        process = self._driver(self.cluster.start, name, probe, "wait", settings)
        assert isinstance(process, HostProcess)
        self.until_ranks_run(self.folder / name)
        return process

    def start_inside(self, name: str, probe: str) -> HostProcess:
        """Start a probe inside an allocation of two nodes, and return when all ranks run."""
        argv = [sys.executable, HERE / "slurm_driver.py", self.folder / name, "{}", "inside"]
        process = self.cluster.start(
            "head",
            ["salloc", "--nodes=2", "--ntasks-per-node=1", *argv],
            cwd=self.folder,
            env=self.environment(PROBE=probe),
        )
        self.until_ranks_run(self.folder / name)
        return process

    def until_ranks_run(self, run_dir: Path) -> None:
        """Wait for both ranks; what rank 0 writes of the run comes before its own file."""
        self.until(lambda: len(list((run_dir / rd.RANKS).glob("[0-9]*.json"))) == 2)

    def zerofit(self, *args: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command of zerofit on the login node."""
        argv = [sys.executable, "-m", "launcher.cli", *args]
        return self.cluster.run(
            "head", argv, cwd=self.folder, env=self.environment(**more), timeout=900
        )

    def status(self, run_dir: Path) -> dict[str, Any]:
        """Return what `zerofit status --json` says."""
        done = self.zerofit("status", run_dir, "--json")
        assert done.returncode == 0, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    def job_id(self, run_dir: Path) -> str:
        return str(json.loads((run_dir / rd.JOB).read_text())["job_id"])

    def until(self, is_so: Callable[[], object], *, seconds: float = WAIT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, "not so in time"
            time.sleep(0.1)

    def _driver(
        self, how: Callable[..., Any], name: str, probe: str, verb: str, settings: Any
    ) -> Any:
        argv = [sys.executable, HERE / "slurm_driver.py", self.folder / name]
        env = {name: value for name, value in settings.items() if name.isupper()}
        settings = {name: value for name, value in settings.items() if name not in env}
        env = self.environment(PROBE=probe, **env)
        return how("head", [*argv, json.dumps(settings), verb], cwd=self.folder, env=env)
