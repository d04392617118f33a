"""What several files of integration tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from worker_runs import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Ranks that are forked from one program, which imports the training stack once."""
    started = Nursery()
    yield started
    started.close()
