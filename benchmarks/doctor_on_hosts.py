"""Time ``zerofit doctor --hostfile`` on virtual hosts with real sshd; needs root.

    python benchmarks/doctor_on_hosts.py [NUMBER OF HOSTS, 16 by default]

All hosts share the cores of this machine, which real ones do not, so the processor's seconds of
the whole machine are printed beside the wall's: they are the hosts' where nothing else runs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cluster"))
from virtual_hosts import VirtualCluster, missing_requirement


def busy_seconds() -> float:
    """Return how long the cores of this machine have worked since it started, in all."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.irq + times.softirq)


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    if reason := missing_requirement():
        raise SystemExit(f"no virtual hosts: {reason}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = VirtualCluster(folder=folder, num_nodes=number)
        try:
            cluster.up()
            (folder / "sixteen").write_text(f"node[1-{number}] slots=1\n")
            for flags, what in (([], "rates measured"), (["--no-measure"], "no rates")):
                argv = [sys.executable, "-m", "launcher.cli", "doctor", "--hostfile", "sixteen"]
                before, began = busy_seconds(), time.monotonic()
                done = cluster.run("head", [*argv, *flags, "--json"], cwd=folder, timeout=300)
                wall, busy = time.monotonic() - began, busy_seconds() - before
                made = json.loads(done.stdout)
                good = sum(host["ok"] for host in made["hosts"])
                print(
                    f"{number} hosts, {what}: {wall:.1f} s on {os.cpu_count()} cores, of "
                    f"which {busy:.1f} s were busy, {busy / number:.1f} s a host; {good} good; "
                    f"{made['rates_problem']}; "
                    f"{made['inter_node_all_reduce_gbit_per_s']} Gbit/s"
                )
        finally:
            cluster.down()


if __name__ == "__main__":
    main()
