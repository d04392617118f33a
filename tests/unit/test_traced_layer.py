"""A layer that was traced takes the place of the ledger of operations."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from launcher.config_facts import is_unknown
from launcher.hardware import default_cluster, find_gpu
from launcher.model_source import resolve_model
from launcher.model_spec import ModelSpec
from launcher.planning.rules import default_attention, why_impossible
from launcher.predict.activations import timeline
from launcher.strategy import Attention, Checkpointing, Method, Strategy
from launcher.traced_layer import (
    TracedArchitecture,
    TracedLayer,
    TracedMoment,
    traced_from_json,
)
from launcher.workload import QuantizationSpec, Workload

H100 = find_gpu("H100-80GB")
TOKENS = 1000


def layer(attention: str = "fused", *, per_token: float = 7.0) -> TracedLayer:
    moment = TracedMoment(
        name="backward to the layer's input",
        peak=(2 * per_token, 0.5, 11.0),
        new_gradient_elements=0,
        last_gradient_elements=0,
        earlier_gradient_elements=0,
        is_parameter_done=False,
    )
    return TracedLayer(
        attention="eager" if attention == "eager" else "fused",
        has_zero3_linear=False,
        saved=(per_token, 0.25, 0.0),
        saved_input=(1.0, 0.0, 0.0),
        unused_in_first_layer=(0.0, 0.0, 0.0),
        forward=(per_token, 0.0, 5.0),
        inference=(3.0, 0.0, 0.0),
        backward=(moment,),
    )


def model(*layers: TracedLayer) -> ModelSpec:
    spec, _ = resolve_model("llama2-7b")
    return replace(spec, traced=TracedArchitecture(layers=layers or (layer(),)))


def workload(spec: ModelSpec, method: Method = Method.full) -> Workload:
    return Workload(model=spec, method=method, max_seq_len=TOKENS, global_batch_size=1)


def test_a_traced_layer_survives_json() -> None:
    traced = TracedArchitecture(layers=(layer(), layer("eager")))
    assert traced_from_json(json.loads(json.dumps(asdict(traced)))).layers == traced.layers


def test_saved_bytes_are_those_of_the_trace_at_this_length() -> None:
    acts = timeline(workload(model()), Strategy(zero_stage=2), H100, adapter_bytes=2)
    # By hand: 7 B a token and a quarter of a byte for each of 1000 x 1000 pairs.
    assert acts.layer_saved_bytes == pytest.approx(7 * TOKENS + 0.25 * TOKENS**2)
    assert max(moment.total_bytes for moment in acts.backward) == pytest.approx(
        14 * TOKENS + 0.5 * TOKENS**2 + 11
    )


def test_a_recomputed_layer_does_not_count_its_input_twice() -> None:
    strategy = Strategy(zero_stage=2, gradient_checkpointing=Checkpointing.full)
    plain = timeline(workload(model()), Strategy(zero_stage=2), H100, adapter_bytes=2)
    recomputed = timeline(workload(model()), strategy, H100, adapter_bytes=2)
    fullest = [max(m.total_bytes for m in acts.backward) for acts in (plain, recomputed)]
    assert fullest[0] - fullest[1] == pytest.approx(1.0 * TOKENS)


def test_eager_attention_has_a_trace_of_its_own() -> None:
    spec = model(layer(), layer("eager", per_token=9.0))
    strategy = Strategy(zero_stage=2, attention=Attention.eager)
    acts = timeline(workload(spec), strategy, H100, adapter_bytes=2)
    assert acts.layer_saved_bytes == pytest.approx(9 * TOKENS + 0.25 * TOKENS**2)


def test_a_quantized_layer_adds_its_largest_dequantized_weight() -> None:
    nf4 = replace(workload(model(), Method.qlora), quantization=QuantizationSpec(kind="nf4"))
    acts = timeline(nf4, Strategy(zero_stage=2), H100, adapter_bytes=2)
    assert acts.backward[0].weight_bytes == 2 * 11008 * 4096


def test_what_was_not_traced_falls_back_to_the_nearest_trace() -> None:
    traced = TracedArchitecture(layers=(layer(), layer("eager")))
    assert traced.layer("eager", has_zero3_linear=True).attention == "eager"


def test_an_architecture_without_formulas_is_unknown() -> None:
    assert is_unknown({"model_type": "olmo2"})
    assert not is_unknown({"model_type": "llama"})
    assert not is_unknown({})  # an error of its own


def test_a_model_of_more_than_text_is_unknown_unless_its_language_model_is_known() -> None:
    text = {"model_type": "llama"}
    assert is_unknown({"model_type": "llava", "text_config": text})
    assert not is_unknown({"model_type": "gemma3", "text_config": text})


def test_layers_with_and_without_experts_have_traces_of_their_own() -> None:
    # By hand: 2 of 32 layers are dense and keep 7 B a token, 30 have experts and keep 9 B.
    spec = replace(
        model(layer(), replace(layer(per_token=9.0), is_moe=True)),
        num_moe_layers=30,
        num_experts=8,
        num_experts_per_token=2,
    )
    acts = timeline(workload(spec), Strategy(zero_stage=2), H100, adapter_bytes=2)
    kept = (2 * 7 + 30 * 9) * TOKENS + 32 * 0.25 * TOKENS**2
    assert acts.layer_saved_bytes * 32 == pytest.approx(kept)


def test_attention_that_torch_cannot_run_is_eager() -> None:
    spec = replace(model(layer(), layer("eager", per_token=9.0)), has_sdpa=False)
    assert default_attention(spec) is Attention.eager
    refused = why_impossible(Strategy(zero_stage=2), workload(spec), default_cluster(H100))
    assert "has no sdpa attention" in (refused or "")
