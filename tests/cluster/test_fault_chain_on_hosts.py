"""One run through fault after fault, on the hosts of a hostfile and under Slurm."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import pytest
from host_processes import HostProcess
from slurm_daemons import Slurm
from virtual_hosts import ROOT, VirtualCluster

sys.path.insert(0, str(ROOT / "tests" / "integration"))
from fault_chain import Place, Process, go_through, go_through_with_sigterm, saved_step, until

from launcher import run_dir as rd
from launcher.dispatch.base import read_handle
from launcher.strategy import ZeroStage

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.slow]


def place_on(cluster: VirtualCluster, folder: Path, *, backend: str, section: str) -> Place:
    def start(*arguments: str, **variables: str) -> HostProcess:
        argv = [sys.executable, "-m", "launcher.cli", *arguments]
        env = {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(folder), **variables}
        return cluster.start("head", argv, cwd=folder, env=env)

    return Place(folder=folder, backend=backend, cluster=section, start=start)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_on_two_hosts_goes_through_all_faults(
    cluster: VirtualCluster, shared_folder: Path, stage: ZeroStage
) -> None:
    (shared_folder / "hosts").write_text("node[1-2] slots=1\n")
    section = f"{{hostfile: {shared_folder}/hosts, pass_env: [ZEROFIT_FAULT]}}"
    place = place_on(cluster, shared_folder, backend="hostfile", section=section)
    go_through_with_sigterm(place, stage)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_slurm_job_goes_through_all_faults(
    slurm: Slurm, cluster: VirtualCluster, shared_folder: Path, stage: ZeroStage
) -> None:
    section = "{backend: slurm, num_nodes: 2, gpus_per_node: 1}"
    place = place_on(cluster, shared_folder, backend="slurm", section=section)
    log = place.run / rd.LAUNCHER_LOG

    def was_asked(number: int) -> bool:
        return log.read_text().count("Slurm says stop") == number

    def stop_and_go_on(process: Process) -> tuple[Process, float]:
        job = read_handle(place.run).job_id
        began = time.time()
        for number in (1, 2):
            cluster.run("head", ["scancel", "--signal=USR1", "--batch", job], check=True)
            until(partial(was_asked, number), process)
        until(lambda: "has been put back into the queue" in process.output, process)
        seconds = time.time() - began
        assert saved_step(place.run) == 5

        slurm.start_again(job)
        return process, seconds

    go_through(
        place, stage, stop_and_go_on=stop_and_go_on,
        stop_row="USR1 from Slurm, twice, in a save that takes 12 s",
        stopped="the save under way is the last; requeued and resumed",
    )  # fmt: skip
