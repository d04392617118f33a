"""Fixtures that several test modules share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How fast the machine is does not count.
settings.register_profile("zerofit", deadline=None)
settings.load_profile("zerofit")
# Kernels that tests build are those of ranks, for which the launcher puts this folder first: by
# another ninja's log, all that is compiled counts as changed.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
# Tests never reach a network, whatever the machine allows.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tokenised data out of the user's cache, and the user's out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Nor does a site file of the user's change what is planned.
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests ``-n 2 --dist loadgroup`` leaves together: those that share a fixture."""
    for item in items:
        folder = item.path.parent.name
        if folder != "unit":
            name = folder if folder == "cluster" else item.path.stem
            item.add_marker(pytest.mark.xdist_group(name))


def pytest_collection_finish() -> None:
    """Look for no more garbage among the imports: pytest does so ten times at the end."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and this machine has none")
