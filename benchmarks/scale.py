"""How long zerofit takes for 1,024 nodes of 8 GPUs, by simulation: prints scale.md.

The cluster is made of files and of 1,024 processes that answer as the guards of hosts do; what
is measured is everything that one zerofit process does for them.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unit"))
from test_preflight import NEEDS, REPORT

from launcher import run_dir as rd
from launcher.dispatch.guards import Guards
from launcher.dispatch.on_nodes import Answer
from launcher.dispatch.preflight import judge
from launcher.dispatch.run_state import observe
from launcher.dispatch.silent_hosts import SilentHosts
from launcher.hostfile import filter_hosts, parse_hostfile, render_hostfile
from launcher.job_script import DeepSpeedJob, render_job
from launcher.launch import run_files
from launcher.peaks import PhasePeaks, RankPeaks, StepPeaks, peaks_to_text
from launcher.prepare import prepare
from launcher.recipe import parse_recipe
from launcher.report.files import write_report
from launcher.run_advice import advise
from launcher.units import GIB, MIB

NODES, GPUS = 1024, 8
LIMIT_SECONDS = 2.0
RECIPE = f"""
model: {{name_or_path: llama2-7b, random_weights: true}}
max_seq_len: 4096
optim: {{global_batch_size: {NODES * GPUS}, max_steps: 10}}
cluster: {{gpu: H100-80GB, num_nodes: {NODES}, gpus_per_node: {GPUS}}}
"""
# A host as the launcher sees it: says hello, reads pings, ends when told.
GUARD = """#!/bin/sh
echo '{"event": "hello", "host": "x", "problem": null}'
while read -r word; do
  case $word in end|kill) echo '{"event": "gone", "left": []}'; exit;; esac
done
"""


PAGE = """\
# 1,024 nodes of 8 GPUs

Printed by `python benchmarks/scale.py`: a simulation on one machine. Seconds are the
processor's, because the machine had other work beside. Planning, rendering, hostfiles, status
and report are each to stay below 2 s.

| step | seconds | |
|---|---|---|
{table}

Peak memory of the process through all steps: {peak:,.0f} MiB.

## What would break first beyond this

- pdsh starts as many ssh at a time as DeepSpeed allows, 1,024 (`PDSH_MAX_FAN_OUT`): the ranks of
  the next host would wait until those of another end. This is the first limit, and a hard one.
- A second ssh for each guard: two open files a host (zerofit raises `ulimit -n` as far as it may),
  and one process more on the login node.
- DeepSpeed hands all hosts to each host in one argument: {argument:,} bytes here, and Linux allows
  131,072 (`MAX_ARG_STRLEN`), which is about {most:,} nodes with names of this length.
- Every rank writes a file into one folder when it ends: 8,192 small files, which the report reads.
"""


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor's seconds: the machine had other work."""
    started = time.process_time()
    value = action()
    return time.process_time() - started, value


def peaks_of(rank: int) -> RankPeaks:
    phase = PhasePeaks(
        peak_allocated_bytes=30 * GIB + rank * MIB,
        peak_reserved_bytes=32 * GIB,
        device_used_bytes=33 * GIB,
        host_rss_bytes=4 * GIB,
        seconds=1.0,
        count=10,
        peak_active_bytes=31 * GIB,
        host_pinned_bytes=GIB,
        gpu_utilisation_fraction=0.9,
        power_watts=600.0,
    )
    in_step = replace(
        phase,
        first_step=StepPeaks(allocated_bytes=30 * GIB, reserved_bytes=32 * GIB),
        steady_state=StepPeaks(allocated_bytes=29 * GIB, reserved_bytes=32 * GIB),
    )
    outside, inside = ("load", "init"), ("forward", "loss", "backward", "step")
    return RankPeaks(
        rank=rank,
        local_rank=rank % GPUS,
        world_size=NODES * GPUS,
        host=f"node{rank // GPUS + 1:04d}",
        pid=1,
        device="cuda",
        device_name="NVIDIA H100 80GB HBM3",
        state="finished",
        steps_done=10,
        phases=dict.fromkeys(outside, phase) | dict.fromkeys(inside, in_step),
        step_seconds=(1.0,) * 10,
        first_step_at=1.7e9,
        tokens_per_step=4096,
    )


def guards_times(folder: Path, hosts: tuple[Any, ...]) -> tuple[float, float]:
    """Return the seconds until all hosts are ready, and to end them."""
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(GUARD)
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    os.environ["PATH"] = f"{ssh.parent}{os.pathsep}{os.environ['PATH']}"
    guards = Guards(hosts=hosts, run_id="x", run_dir=folder, master_port=1)
    up, _ = timed(guards.start)
    down, is_gone = timed(lambda: guards.end(at_once=False))
    guards.close()
    if not is_gone:
        raise SystemExit("the guards did not end")
    return up, down


def main() -> None:
    rows: list[tuple[str, float, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = f"node[0001-{NODES}] slots={GPUS}\n"
        seconds, hosts = timed(lambda: parse_hostfile(text, source="hosts"))
        rows.append(("read a hostfile of one range", seconds, f"{len(hosts)} hosts"))
        lines = render_hostfile(hosts)
        seconds, _ = timed(lambda: parse_hostfile(lines, source="hosts"))
        rows.append((f"read a hostfile of {NODES} lines", seconds, f"{len(lines):,} bytes"))
        seconds, kept = timed(
            lambda: filter_hosts(hosts, include=None, exclude="node[0100-0200]", source="hosts")
        )
        rows.append(("filter it", seconds, f"{len(kept)} hosts kept"))
        seconds, prepared = timed(
            lambda: prepare(parse_recipe(RECIPE, source="scale"), source="scale")
        )
        rows.append(("plan", seconds, f"ZeRO-{prepared.plan.strategy.zero_stage}"))
        run_dir = rd.create(folder / "run")
        job = DeepSpeedJob(
            run_dir=PurePosixPath(run_dir),
            run_id="0" * 32,
            python=PurePosixPath("/venv/bin/python"),
            ranks_per_node=GPUS,
            device_type="cuda",
            master_port=29500,
            omp_num_threads=8,
            hosts=hosts,
        )
        seconds, request = timed(lambda: render_job(job, files=run_files(prepared)))
        size = sum(map(len, request.files.values()))
        rows.append(("render all files of the run", seconds, f"{size:,} bytes"))
        for file, content in request.files.items():
            rd.write_text(run_dir / file, content)
        answers = [
            Answer(host=host.name, value=asdict(replace(REPORT, host=host.name)), at_seconds=1000.0)
            for host in hosts
        ]
        seconds, nodes = timed(lambda: judge(hosts, answers, NEEDS))
        rows.append(("compare the nodes' reports (doctor)", seconds, f"{len(nodes)} nodes"))
        for rank in range(NODES * GPUS):
            rd.write_text(rd.rank_file(run_dir, rank), peaks_to_text(peaks_of(rank)))
        rd.write_status(run_dir, "finished")
        seconds, _ = timed(lambda: observe([run_dir]))
        rows.append(("status", seconds, ""))
        silent = SilentHosts(run_dir=run_dir)
        silent.look()
        seconds, _ = timed(silent.look)
        rows.append(("look for silent hosts under Slurm", seconds, "every 2 s while it runs"))
        steps = (json.dumps({"step": step, "loss": 3 - step / 100}) for step in range(1, 11))
        rd.write_text(run_dir / rd.TRAINER_LOG, "".join(f"{line}\n" for line in steps))
        seconds, made = timed(lambda: write_report(run_dir, advise=advise))
        size = sum(path.stat().st_size for path in made.paths)
        rows.append((f"report of {NODES * GPUS:,} ranks", seconds, f"{size:,} bytes"))
        up, down = guards_times(folder, hosts)
        rows.append(("connect to the guards of all hosts", up, "local processes in place of ssh"))
        rows.append(("end the run on all hosts", down, ""))
    show(rows, hosts)


def show(rows: list[tuple[str, float, str]], hosts: tuple[Any, ...]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB
    world = base64.urlsafe_b64encode(
        json.dumps({host.name: list(range(GPUS)) for host in hosts}).encode()
    )
    shown = []
    for what, seconds, note in rows:
        mark = "" if seconds < LIMIT_SECONDS else " **above 2 s**"
        shown.append(f"| {what} | {seconds:.3f}{mark} | {note} |")
    print(
        PAGE.format(
            table="\n".join(shown),
            peak=peak,
            argument=len(world),
            most=131_072 * len(hosts) // len(world),
        )
    )


if __name__ == "__main__":
    main()
