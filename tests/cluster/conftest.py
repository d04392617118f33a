"""The test cluster as fixtures: ``cluster`` (hosts with sshd) and ``slurm`` (Slurm on them)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_daemons import SLURM_PROGRAMS, Slurm
from slurm_runs import SlurmRuns
from virtual_hosts import PROGRAMS, VirtualCluster, missing_requirement


@pytest.fixture(scope="session")
def _session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    reason = missing_requirement(PROGRAMS)
    if reason is not None:
        pytest.skip(f"no test cluster: {reason}")
    base = tmp_path_factory.getbasetemp()
    made = VirtualCluster(folder=tmp_path_factory.mktemp("cluster"), shared=(base,))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def _session_slurm(_session_cluster: VirtualCluster) -> Slurm:
    reason = missing_requirement(SLURM_PROGRAMS)
    if reason is not None:
        pytest.skip(f"no Slurm: {reason}")
    made = Slurm(cluster=_session_cluster)
    made.up()
    return made


@pytest.fixture
def cluster(_session_cluster: VirtualCluster) -> Iterator[VirtualCluster]:
    """Five idle hosts: head, node1 to node4; what a test hurts is booted anew after it."""
    yield _session_cluster
    _session_cluster.heal()


@pytest.fixture
def slurm(_session_slurm: Slurm, cluster: VirtualCluster) -> Iterator[Slurm]:
    """Slurm on the cluster: slurmctld on head, slurmd on the nodes, no accounting database."""
    _session_slurm.wait_idle()  # hosts may have been booted anew since
    yield _session_slurm
    _session_slurm.cancel_all()
    cluster.heal()
    _session_slurm.wait_idle()


@pytest.fixture
def runs(slurm: Slurm, cluster: VirtualCluster, shared_folder: Path) -> SlurmRuns:
    """Start probes and zerofit's commands on the login node."""
    return SlurmRuns(cluster=cluster, folder=shared_folder)


@pytest.fixture
def shared_folder(tmp_path: Path) -> Path:
    """Return a folder that all hosts see at the same path."""
    return tmp_path
