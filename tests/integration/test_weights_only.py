"""What ``torch.load`` takes out of a checkpoint in a rank."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from launcher.worker.weights_only import FORCED, load_weights_only

pytestmark = pytest.mark.integration


class _Attribute:
    """Written down as an attribute of something else, as Python 3.11.2 writes enums."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, "1")
    load_weights_only()


@pytest.mark.usefixtures("reading")
def test_a_stage_as_python_3_11_2_writes_it_is_read(tmp_path: Path) -> None:
    torch.save({"zero_stage": _Attribute(ZeroStageEnum, "gradients")}, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt") == {"zero_stage": ZeroStageEnum.gradients}


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("owner", [LossScaler, torch.nn.Linear, "text"])
def test_no_other_attribute_is_read_even_where_code_asks_for_all(
    tmp_path: Path, owner: Any
) -> None:
    torch.save({"zero_stage": _Attribute(owner, "__init__")}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "state.pt", weights_only=False)
