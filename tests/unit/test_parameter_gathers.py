"""ZeRO-3's gathers against DeepSpeed 0.19.8's own coordinator.

The expected elements were counted in the engine itself (``zerofit trace``'s: one rank of two,
real hooks) on Llama-2-7B's widths with three layers, with the buckets that zerofit chooses.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning_inputs import workload

from launcher.predict import parameter_gathers
from launcher.predict.module_calls import call_setting
from launcher.predict.parameter_gathers import GatheredBytes, gathered_bytes, replay
from launcher.strategy import Checkpointing, Loss, Method, Strategy, ZeroKnobs

KNOBS = ZeroKnobs(
    stage3_max_live_parameters=100_000_000,
    stage3_prefetch_bucket_size=15_099_494,
    stage3_param_persistence_threshold=40_960,
)
BYTES = 2


def gathers(
    *, method: Method, checkpointing: Checkpointing, loss: Loss = Loss.full, layers: int = 3
) -> GatheredBytes:
    wanted = workload(method=method, tokens=2048)
    wanted = replace(wanted, model=replace(wanted.model, num_hidden_layers=layers))
    strategy = Strategy(zero_stage=3, gradient_checkpointing=checkpointing, loss=loss, zero=KNOBS)
    return gathered_bytes(
        call_setting(wanted, strategy),
        KNOBS,
        element_bytes=BYTES,
        world_size=2,
        has_offloaded_params=False,
    )


@pytest.mark.parametrize(
    ("method", "checkpointing", "loss", "expected"),
    [
        (Method.lora, Checkpointing.none, Loss.full, (373_432_320, 504_504_320, 373_432_320)),
        (Method.full, Checkpointing.none, Loss.full, (371_195_904, 502_267_904, 371_195_904)),
        (Method.full, Checkpointing.full, Loss.full, (247_463_936, 378_535_936, 247_463_936)),
        (Method.full, Checkpointing.full, Loss.chunked, (140_509_184, 266_338_304, 202_375_168)),
    ],
)
def test_as_much_is_gathered_as_in_the_engine(
    method: Method, checkpointing: Checkpointing, loss: Loss, expected: tuple[int, int, int]
) -> None:
    found = gathers(method=method, checkpointing=checkpointing, loss=loss)
    most = (max(found.forward), found.loss, max(found.backward))
    assert most == tuple(BYTES * elements for elements in expected)


@pytest.mark.parametrize("checkpointing", [Checkpointing.none, Checkpointing.full])
def test_the_layers_left_out_are_like_their_neighbours(
    checkpointing: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = gathers(method=Method.lora, checkpointing=checkpointing, layers=24)
    replay.cache_clear()
    monkeypatch.setattr(parameter_gathers, "_layers_to_replay", lambda *_: (24, 0))
    every = gathers(method=Method.lora, checkpointing=checkpointing, layers=24)
    replay.cache_clear()
    assert some == every


def test_the_fused_loss_holds_the_output_matrix_from_first_to_last() -> None:
    # liger_kernel 0.8.5 reads lm_head.weight outside its module: DeepSpeed makes it a parameter
    # of the whole model (zero/parameter_offload.py:ZeROOrderedDict.__getitem__).
    found = gathers(method=Method.lora, checkpointing=Checkpointing.none, loss=Loss.liger)
    output = BYTES * 32_000 * 4096
    assert min(*found.forward, found.loss, *found.backward, found.end) >= output
