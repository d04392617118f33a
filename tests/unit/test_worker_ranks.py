"""Which rank a process is, whoever started it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from launcher.errors import SetupError
from launcher.worker.gather_peaks import is_under_mpi
from launcher.worker.ranks import Ranks, find_programs_beside_python, ranks_from_environment

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
}
MPICH = {"PMI_RANK": "3", "MPI_LOCALRANKID": "1", "PMI_SIZE": "4"}


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH], ids=["Open MPI", "MPICH"])
def test_mpi_says_which_rank_this_is(variables: dict[str, str]) -> None:
    found = ranks_from_environment({**variables, "MASTER_ADDR": "node1"})
    assert found == Ranks(rank=3, local_rank=1, world_size=4)
    assert is_under_mpi(variables)


def test_ranks_of_mpirun_without_a_place_to_meet_are_told_how_to_name_one() -> None:
    with pytest.raises(SetupError, match="do not know where to meet"):
        ranks_from_environment(OPEN_MPI)


def test_a_launcher_of_torch_comes_before_mpi() -> None:
    env = {**OPEN_MPI, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert ranks_from_environment(env) == Ranks(rank=0, local_rank=0, world_size=1)


def test_mpi_is_not_initialised_under_srun_with_pmi2() -> None:
    assert not is_under_mpi({**MPICH, "SLURM_PROCID": "3"})
    assert is_under_mpi({"PMIX_RANK": "3", "SLURM_PROCID": "3"})
    assert not is_under_mpi({"RANK": "0"})


@pytest.mark.parametrize("path", ["/usr/bin:/bin", None])
def test_ranks_find_the_programs_beside_their_python_first(
    path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    for _ in range(2):
        find_programs_beside_python()
        assert shutil.which(Path(sys.executable).name) == sys.executable
        assert os.environ["PATH"].endswith(path or os.defpath)
        assert os.environ["PATH"].count(str(Path(sys.executable).parent)) == 1
