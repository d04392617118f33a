"""Activations against traces of transformers' own modules.

Expected figures are bytes of distinct storages that a dispatch-mode tracker counted while
transformers 5.23 ran forward and backward of the real architectures (bf16, dropout 0 unless
said, batch 1, 2,048 tokens), in MiB.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.hardware import find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import ModelSpec, spec_from_config
from launcher.predict.activations import timeline
from launcher.predict.attention_kernel import attention_kernel
from launcher.predict.layer_parts import AttentionKernel, LayerSetting
from launcher.predict.layer_profile import layer_profile
from launcher.predict.output_layer import OutputLayer
from launcher.strategy import Loss, Method, Precision, Strategy
from launcher.units import MIB
from launcher.workload import Workload

TOKENS = 2048
SCORES = TOKENS * TOKENS


def model(name: str) -> ModelSpec:
    return spec_from_config(load_catalogue_entry(name).config, name=name)


def setting(
    name: str,
    *,
    attention: AttentionKernel = "flash",
    targets: frozenset[str] | None = None,
    adapter_bytes: int = 2,
    dropout: bool = False,
    is_cuda: bool = False,
    zero3: bool = False,
    liger: bool = False,
) -> LayerSetting:
    spec = model(name)
    return LayerSetting(
        model=spec,
        is_moe=spec.num_experts > 0,
        element_bytes=2,
        adapter_targets=targets or frozenset(),
        adapter_rank=16,
        adapter_bytes=adapter_bytes,
        has_adapter_dropout=dropout,
        is_frozen=targets is not None,
        has_zero3_linear=zero3,
        quantization=None,
        attention=attention,
        has_fp32_softmax_input=True,
        has_liger=liger,
        is_cuda=is_cuda,
    )


def saved_mib(layer: LayerSetting, tokens: int = TOKENS) -> float:
    return layer_profile(layer).saved.at(tokens, tokens * tokens) / MIB


def block_mib(layer: LayerSetting) -> float:
    """Most that one recomputed layer's backward needs, its new weight gradient included."""
    return (
        max(
            (moment.saved + moment.passing).at(TOKENS, SCORES)
            + (0 if moment.is_parameter_done else 2 * moment.new_gradient_elements)
            for moment in layer_profile(layer).backward
        )
        / MIB
    )


@pytest.mark.parametrize(
    ("name", "attention", "expected_mib"),
    [
        ("llama2-7b", "flash", 364.27),
        ("llama3-8b", "flash", 392.27),
        ("mistral-7b", "flash", 392.27),
        ("llama2-70b", "flash", 776.5),
        ("qwen2-7b", "flash", 440.2),
        ("qwen3-8b", "flash", 420.6),
        ("phi-3-mini-4k", "flash", 308.3),
        ("phi-4", "flash", 535.3),
        ("falcon-180b", "efficient_masked", 879.8),
        ("mixtral-8x7b", "flash", 680.5),
        ("qwen3-30b-a3b", "flash", 380.1),
    ],
)
def test_a_layer_saves_what_the_trace_of_its_architecture_shows(
    name: str, attention: AttentionKernel, expected_mib: float
) -> None:
    assert saved_mib(setting(name, attention=attention)) == pytest.approx(expected_mib, rel=1e-3)


@pytest.mark.parametrize(("tokens", "expected_mib"), [(2048, 1132.0), (4096, 3800.0)])
def test_eager_attention_saves_fp32_and_low_precision_scores(
    tokens: int, expected_mib: float
) -> None:
    layer = setting("llama2-7b", attention="eager")
    assert saved_mib(layer, tokens) == pytest.approx(expected_mib, abs=0.1)


def test_a_padding_mask_costs_one_mask_and_repeated_keys_in_every_layer() -> None:
    layer = setting("llama3-8b", attention="efficient_masked")
    assert saved_mib(layer) == pytest.approx(424.3, abs=0.1)


@pytest.mark.parametrize(
    ("targets", "adapter_bytes", "dropout", "is_cuda", "expected_mib"),
    [
        ("none", 2, False, False, 257.3),
        ("qv", 2, False, False, 273.4),
        ("qv", 4, False, False, 321.5),
        ("all", 2, False, False, 332.7),
        ("all", 4, False, False, 536.1),
        ("all", 4, True, False, 814.1),
        ("all", 2, True, False, 535.7),
        # The same two with CUDA's byte mask: the trace less 3 or 1 B x 2,048 x 35,584 inputs.
        ("all", 4, True, True, 605.6),
        ("all", 2, True, True, 466.2),
    ],
)
def test_lora_saves_what_the_trace_shows(
    targets: str, adapter_bytes: int, dropout: bool, is_cuda: bool, expected_mib: float
) -> None:
    linears = {w.name for w in model("llama2-7b").weights if w.role == "linear"}
    chosen = {
        "none": set(),
        "qv": {name for name in linears if "q_proj" in name or "v_proj" in name},
        "all": linears,
    }[targets]
    layer = setting(
        "llama2-7b",
        targets=frozenset(chosen),
        adapter_bytes=adapter_bytes,
        dropout=dropout,
        is_cuda=is_cuda,
    )
    assert saved_mib(layer) == pytest.approx(expected_mib, abs=0.1)


@pytest.mark.parametrize(
    ("name", "attention", "traced_mib"),
    [
        ("llama2-7b", "flash", 512.28),
        ("llama3-8b", "flash", 579.28),
        ("llama2-70b", "flash", 1371.53),
        ("llama2-7b", "eager", 1675.02),
        ("llama3-8b", "eager", 1675.02),
        ("llama2-70b", "eager", 3339.02),
    ],
)
def test_a_recomputed_layers_backward_peaks_where_the_trace_does(
    name: str, attention: AttentionKernel, traced_mib: float
) -> None:
    # The trace (peak minus the layers' saved inputs, vocabulary 512) also holds cos and sin
    # (2 x 2 B x s x head size: 1 MiB), the logits (2 MiB) and, when eager, the mask (8 MiB).
    others = 1 + 2 + (8 if attention == "eager" else 0)
    layer = setting(name, attention=attention)
    assert block_mib(layer) == pytest.approx(traced_mib - others, abs=0.6)


def test_zero_3_linear_layers_keep_the_input_of_frozen_weights() -> None:
    # LinearFunctionForZeroStage3 saves it: 2 B x h for q, k, v together, 2 B x h for gate and
    # up, 2 B x f for down; o_proj's is the attention output, which is there already.
    frozen = frozenset[str]()
    extra = saved_mib(setting("llama2-7b", targets=frozen, zero3=True)) - saved_mib(
        setting("llama2-7b", targets=frozen)
    )
    assert extra == pytest.approx(TOKENS * 2 * (4096 + 4096 + 11008) / MIB)


def test_liger_kernels_keep_one_input_per_norm_and_no_activated_gate() -> None:
    # Per token, h = 4096, f = 14336: two norms keep their input and 4 B, their outputs feed
    # trained matrices (2 x 2 x 2h); q, k, v, output: 4h + 2 x 1024 values; gate, up, product.
    per_token = 2 * (4096 * 2 + 4) + 2 * 2 * 4096 + 2 * (2 * 4096 + 2 * 1024) + 4 * 32
    per_token += 3 * 2 * 14336
    assert saved_mib(setting("llama3-8b", liger=True)) == pytest.approx(TOKENS * per_token / MIB)


def kernel(name: str, *, tokens: int, gpu: str, precision: Precision) -> AttentionKernel:
    workload = Workload(
        model=model(name),
        method=Method.lora,
        max_seq_len=tokens,
        global_batch_size=1,
        precision=precision,
    )
    return attention_kernel(workload, Strategy(zero_stage=2), find_gpu(gpu))


def test_a_full_sliding_window_brings_a_mask_into_every_layer() -> None:
    # H100, Phi-3-mini-4k (window 2,047) at 2,048 tokens: 268.5 MB more than without a mask in
    # 32 layers, one bf16 score for every pair of tokens each; the output copy stays.
    bf16 = Precision.bf16
    assert kernel("phi-3-mini-4k", tokens=2046, gpu="H100-80GB", precision=bf16) == "flash"
    masked = kernel("phi-3-mini-4k", tokens=2048, gpu="H100-80GB", precision=bf16)
    assert masked == "efficient_masked"
    base = setting("phi-3-mini-4k", is_cuda=True)
    changed = replace(base, attention=masked, has_cudnn_attention=True)
    more = (saved_mib(changed) - saved_mib(base)) * MIB
    assert 32 * more / 1e6 == pytest.approx(268.5, rel=0.005)


def test_layers_without_a_window_keep_what_no_mask_makes_them_keep() -> None:
    # Gemma 3 1B: 22 layers see 512 tokens, 4 see all of 1,024 and need no mask. With one, a layer
    # keeps a bf16 score of every pair, and no copies of its single k and v head: H100, LoRA on
    # 3 x 1,152 tokens: forward 11.46 GB, where copies would take 0.23 more.
    def saved(spec: ModelSpec) -> float:
        wanted = Workload(model=spec, method=Method.full, max_seq_len=1024, global_batch_size=1)
        acts = timeline(wanted, Strategy(zero_stage=2), find_gpu("H100-80GB"), adapter_bytes=2)
        return acts.layer_saved_bytes * acts.num_layers

    mixed = model("gemma3-1b")
    assert (mixed.num_hidden_layers, mixed.num_sliding_layers) == (26, 22)
    all_masked = replace(mixed, num_sliding_layers=26)
    assert saved(all_masked) - saved(mixed) == pytest.approx(4 * 1024 * 1024 * 2)


def test_fp32_with_grouped_heads_runs_the_memory_efficient_kernel_on_copied_heads() -> None:
    fp32 = Precision.fp32
    assert kernel("llama2-7b", tokens=1024, gpu="H100-80GB", precision=fp32) == "efficient"
    assert kernel("llama3.2-1b", tokens=1024, gpu="H100-80GB", precision=fp32) == "efficient"
    # 8 key/value heads of 64 numbers copied to 32: k and v grow by 2 x 24 x 64 x 4 B a token.
    base = setting("llama3.2-1b", attention="flash", is_cuda=True)
    shared = replace(base, element_bytes=4)
    copied = replace(shared, attention="efficient")
    more = layer_profile(copied).saved.token - layer_profile(shared).saved.token
    assert more == 2 * 24 * 64 * 4


def test_torchs_math_keeps_what_a_gpu_measured() -> None:
    # H100, Llama-3.2-1B in fp32 at 1,024 tokens, heads not copied beforehand: 2,346.7 MB more in
    # 16 layers than with a fused kernel. Falcon-7B still comes to this.
    fused = replace(setting("llama3.2-1b", attention="flash", is_cuda=True), element_bytes=4)
    math = replace(fused, attention="math")
    more = (saved_mib(math, 1024) - saved_mib(fused, 1024)) * MIB
    assert 16 * more / 1e6 == pytest.approx(2346.7, rel=0.001)


def test_a_sum_of_two_gradients_is_a_third_tensor() -> None:
    # H100, Llama-3-8B with Liger at 4,096 tokens: one more tensor of 4,096 x 14,336 bf16 than
    # if the adapter's gradient were added to in place.
    linears = frozenset(w.name for w in model("llama3-8b").weights if w.role == "linear")
    layer = setting("llama3-8b", targets=linears, liger=True, is_cuda=True)
    sums = [m for m in layer_profile(layer).backward if "down_proj (gradient sum)" in m.name]
    (moment,) = sums
    # gate and up are still saved; the product's two gradients and their sum.
    wide = 2 * 14336
    saved_inside = layer_profile(layer).saved.token - 3 * wide  # without gate, up and product
    assert moment.passing.token == pytest.approx(3 * wide + 2 * 4096)
    assert moment.saved.token < saved_inside + 2 * wide


def head(*, tokens: int = 2048, vocab_size: int = 32000, is_trained: bool = False) -> OutputLayer:
    return OutputLayer(
        tokens=tokens,
        hidden_size=4096,
        vocab_size=vocab_size,
        element_bytes=2,
        is_head_trained=is_trained,
        keeps_hidden=is_trained,
        has_softcap=False,
    )


@pytest.mark.parametrize(
    ("tokens", "vocab_size", "expected_gb"),
    [(2048, 32000, 0.79), (2048, 128256, 3.15), (8192, 128256, 12.6)],
)
def test_cross_entropy_needs_12_bytes_per_logit(
    tokens: int, vocab_size: int, expected_gb: float
) -> None:
    moments = head(tokens=tokens, vocab_size=vocab_size).moments(Loss.full)
    peak = max(moment.logits_bytes for moment in moments)
    assert peak / 1e9 == pytest.approx(expected_gb, rel=0.005)


def test_the_chunked_loss_holds_12_bytes_for_one_chunk_only() -> None:
    # 8,192 x 128,256 logits in chunks of at most 2**25: 32 chunks of 256 tokens.
    moments = head(tokens=8192, vocab_size=128256).moments(Loss.chunked)
    assert max(moment.logits_bytes for moment in moments) == 12 * 256 * 128256


def test_liger_holds_one_chunk_of_low_precision_logits() -> None:
    # Chunk: 4,096 tokens / ceil(128,256 / 4,096) = 128, already a power of two.
    moments = head(tokens=4096, vocab_size=128256).moments(Loss.liger)
    assert moments[0].logits_bytes == 2 * 128 * 128256


def test_dora_keeps_both_operands_of_its_magnitudes() -> None:
    # By hand for Llama-2-7B in bf16: the base's and the adapter's output of every linear layer,
    # 5 x 4,096 + 2 x 11,008 = 42,496 numbers a token each (peft 0.21 tuners/lora/dora.py). The
    # engine as rank 0 of 2, Llama-3.2-1B at 512 tokens: 3.99 GiB in backward, 3.97 predicted;
    # 3.26 without this.
    linears = frozenset(w.name for w in model("llama2-7b").weights if w.role == "linear")
    plain = setting("llama2-7b", targets=linears, is_cuda=True)
    more = layer_profile(replace(plain, has_dora=True)).saved.token
    assert more - layer_profile(plain).saved.token == 2 * 42_496 * 2
