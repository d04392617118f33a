"""Attention, from the projections to the output, as operations on a tape.

Source:
    transformers 5.23 ``modeling_llama.py:LlamaAttention``, ``modeling_falcon.py``,
    ``integrations/sdpa_attention.py``; torch 2.13 ``transformers/cuda/flash_attn/flash_api.cpp``,
    ``transformers/attention.cpp``.
"""

from __future__ import annotations

from launcher.model_spec import WeightSpec
from launcher.predict.autograd_tape import NOTHING, Extra, Size
from launcher.predict.layer_parts import LayerParts

ATTENTION_OUTPUTS = frozenset({"o_proj", "dense", "out_proj"})
# RoPE that ends in a concatenation leaves q ordered by head. The flash kernels of CUDA and the
# CPU give their output q's order: bringing it back to tokens is a copy that the output
# projection keeps; so does cuDNN's, which Hopper runs where a mask rules out flash (H100,
# Phi-3-mini with its sliding window). The memory-efficient kernel always orders by token.
_ROPE_BY_HEAD = frozenset({"gpt_neox", "phi", "phi3"})


class AttentionParts(LayerParts):
    """Writes attention in each of its kernels."""

    named: tuple[int, ...] = ()
    """Tensors that Python variables keep alive until attention returns."""

    def attention(self, value: int) -> int:
        """Write attention from the normed hidden state to the output projection."""
        inputs = [w for w in self.attention_linears if w.module not in ATTENTION_OUTPUTS]
        (output,) = [w for w in self.attention_linears if w.module in ATTENTION_OUTPUTS]
        query, key, content, kept = self._query_key_value(value, inputs)
        named: tuple[int, ...] = (value, query, key, content)
        if self.setting.exchanged_key_copies:
            query, key, content = self._exchange_all(query, key, content)
            kept = (content,)
        if self.setting.attention == "math":
            attended = self._math(query, key, content)
        elif self.setting.attention == "eager":
            attended = self._eager(query, key, content, kept)
        else:
            attended = self._fused(query, key, content, kept)
        if self.setting.exchanged_key_copies:
            attended = self._exchange(attended, self.model.num_attention_heads)
            named = (*named, query, key, content)
        self.tape.hold(named)  # variables of the attention's forward
        return self.linear(attended, output)

    def _query_key_value(
        self, value: int, inputs: list[WeightSpec]
    ) -> tuple[int, int, int, tuple[int, ...]]:
        """Write projections, head norms and RoPE; return q, k, v and what v's storage is."""
        model = self.model
        heads = model.num_attention_heads
        queries = self.model.head_dim * heads
        keys = self.model.head_dim * model.num_key_value_heads
        if len(inputs) == 1:
            return self._fused_projection(value, inputs[0], queries, keys)
        query, key, content = (self.linear(value, weight) for weight in inputs)
        if model.has_qk_norm:
            query = self.norm(query, elements=queries, rows=heads)
            key = self.norm(key, elements=keys, rows=model.num_key_value_heads)
        return self.rope(query, queries), self.rope(key, keys), content, (content,)

    def _fused_projection(
        self, value: int, weight: WeightSpec, queries: int, keys: int
    ) -> tuple[int, int, int, tuple[int, ...]]:
        packed, tape = self.linear(value, weight), self.tape
        is_falcon = self.model.model_type == "falcon"
        if is_falcon and self.model.num_key_value_heads > 1:
            # Falcon copies k and v to every query head (modeling_falcon.py:_split_heads).
            whole = self.per_token(queries)
            query, key, content = (tape.record("split heads", (packed,), whole) for _ in range(3))
            self.named = (packed,)
            return self.rope(query, queries), self.rope(key, queries), content, (content,)
        parts = [
            tape.record("split heads", (packed,), NOTHING, gradient=self.per_token(width))
            for width in (queries, keys, keys)
        ]
        kept = packed
        return self.rope(parts[0], queries), self.rope(parts[1], keys), parts[2], (kept,)

    def _exchange_all(self, query: int, key: int, content: int) -> tuple[int, int, int]:
        """Write what a rank that shares sequences does before attention: its heads' tokens of all.

        Source: ``launcher/worker/sequence.py``.
        """
        model, copies = self.model, self.setting.exchanged_key_copies
        heads = model.num_key_value_heads * copies
        if copies > 1:
            size = self.per_token(heads * model.head_dim)
            key = self.tape.record("copy key heads", (key,), size)
            content = self.tape.record("copy value heads", (content,), size)
        return (
            self._exchange(query, model.num_attention_heads),
            self._exchange(key, heads),
            self._exchange(content, heads),
        )

    def _exchange(self, value: int, heads: int) -> int:
        """Write an all-to-all: ordered for sending, received, and ordered for use."""
        size = self.per_token(heads * self.model.head_dim)
        return self.tape.record(
            "exchange of tokens for heads", (value,), size, extra=Extra(forward=size, backward=size)
        )

    def rope(self, value: int, elements: int) -> int:
        """Write the rotary embedding of q or k, ``elements`` per token."""
        # Backward: grad * sin, its two rotated slices (full size each).
        size = self.per_token(elements)
        if self.setting.has_liger:
            return self.tape.record("rotary embedding", (value,), size, gradient="shared")
        return self.tape.record(
            "rotary embedding", (value,), size, extra=Extra(forward=size * 2, backward=size * 3)
        )

    def _repeat(self, value: int) -> int:
        model = self.model
        if model.num_key_value_heads == model.num_attention_heads or self.named:
            return value  # as many as the queries have, or already copied to them
        whole = model.num_attention_heads * model.head_dim
        return self.tape.record("repeat key/value heads", (value,), self.per_token(whole))

    def _fused(self, query: int, key: int, content: int, kept: tuple[int, ...]) -> int:
        """Write FlashAttention-2 or the memory-efficient kernel: q, k, v, output, log-sum-exp."""
        model, heads = self.model, self.model.num_attention_heads
        whole = self.per_token(heads * model.head_dim)
        is_masked = self.setting.attention == "efficient_masked"
        # The processor's kernel knows groups; CUDA's memory-efficient one does not.
        is_copied = is_masked or (self.setting.is_cuda and self.setting.attention == "efficient")
        saved_key = key
        if is_copied and model.num_key_value_heads == 1 and not self.named:
            # transformers' repeat_kv: what is expanded from one head is a view, and stays one
            # (H100, Gemma 3 1B with LoRA: 0.23 GB less than copies in 22 layers).
            key, content = (
                self.tape.record("expand key/value head", (value,), NOTHING, gradient=whole)
                for value in (key, content)
            )
        elif is_copied:
            key, repeated = self._repeat(key), self._repeat(content)
            kept, content = (kept if repeated == content else (repeated,)), repeated
            saved_key = key
        is_grouped = model.num_key_value_heads != heads and not is_copied
        backward = NOTHING
        if self.setting.is_cuda:
            # flash_api.cpp:mha_bwd: dq in fp32, row sums, and dk, dv for every query head.
            backward = self.per_token(heads * model.head_dim, 4) + Size(token=4 * heads)
            backward = backward + (whole * 2 if is_grouped else NOTHING)
        attended = self.tape.record(
            "attention", (query, key, content), whole,
            saves=(query, saved_key, *kept), saves_output=True,
            # A bool mask becomes an additive one in each layer, for all heads together.
            extra=Extra(
                saved=Size(token=4 * heads, score=self.width if is_masked else 0),
                backward=backward,
            ),
        )  # fmt: skip
        # An exchange orders by head, too.
        is_by_head = model.model_type in _ROPE_BY_HEAD or self.setting.exchanged_key_copies > 0
        if self._keeps_query_order() and is_by_head:
            attended = self.tape.record("attention output copy", (attended,), whole)
        return attended

    def _keeps_query_order(self) -> bool:
        if self.setting.attention == "efficient_masked":
            return self.setting.has_cudnn_attention
        return self.setting.attention == "flash" or not self.setting.is_cuda

    def _eager(self, query: int, key: int, content: int, kept: tuple[int, ...]) -> int:
        model, tape, heads = self.model, self.tape, self.model.num_attention_heads
        key, repeated = self._repeat(key), self._repeat(content)
        kept, content = (kept if repeated == content else (repeated,)), repeated
        low, wide = Size(score=heads * self.width), Size(score=4 * heads)
        whole = self.per_token(heads * model.head_dim)
        scores = tape.record("scores", (query, key), low, saves=(query, key))
        scores = tape.record("score scaling", (scores,), low)
        if model.attention_softcap is not None:
            scores = tape.record("score cap division", (scores,), low)
            scores = tape.record("score cap", (scores,), low, saves_output=True)
            scores = tape.record("score cap product", (scores,), low)
        raw = scores
        scores = masked = tape.record("score mask", (scores,), low, gradient="shared")
        has_fp32 = self.width == 4 or model.model_type != "falcon"
        if has_fp32 and self.setting.has_fp32_softmax_input:
            scores = tape.record("softmax upcast", (scores,), wide)
        kind = wide if has_fp32 else low
        scores = tape.record(
            "softmax", (scores,), kind, saves_output=True,
            extra=Extra(backward=self._softmax_backward(kind)),
        )  # fmt: skip
        tape.hold((masked,))  # its variable is assigned anew only after the softmax
        if model.model_type == "falcon":
            tape.hold((raw, *self.named))  # its forward names them to the end
        if has_fp32 and self.width != 4:
            scores = tape.record("softmax downcast", (scores,), low)
        attended = tape.record("values", (scores, content), whole, saves=(scores, *kept))
        return tape.record("attention output copy", (attended,), whole)

    def _softmax_backward(self, scores: Size) -> Size:
        """Return the product of gradient and output, which CUDA's kernel takes as its input.

        Source: torch 2.13 ``aten/src/ATen/native/cuda/SoftMax.cu:softmax_backward_cuda_out``.
        """
        return scores if self.setting.is_cuda else NOTHING

    def _math(self, query: int, key: int, content: int) -> int:
        """Write SDPA's fallback: scaled q and k, v for all heads, scores, all in fp32.

        Source: torch 2.13 ``transformers/attention.cpp:_scaled_dot_product_attention_math``;
        a single key/value head comes already expanded and is broadcast.
        """
        model, tape, heads = self.model, self.tape, self.model.num_attention_heads
        wide = Size(score=4 * heads)
        whole = self.per_token(heads * model.head_dim, 4)
        is_broadcast = model.num_key_value_heads == 1
        inner = self.per_token(model.head_dim, 4) if is_broadcast else whole
        query = tape.record("query scaling", (query,), whole)
        key = tape.record("key scaling", (key,), inner)
        if self.width != 4 or inner != tape.size(content):
            content = tape.record("value for all heads", (content,), inner)
        scores = tape.record("scores", (query, key), wide, saves=(query, key))
        scores = tape.record("score mask", (scores,), wide, gradient="shared")
        scores = tape.record(
            "softmax", (scores,), wide, saves_output=True,
            extra=Extra(backward=self._softmax_backward(wide)),
        )  # fmt: skip
        attended = tape.record("values", (scores, content), whole, saves=(scores, content))
        return tape.record("attention output", (attended,), self.per_token(heads * model.head_dim))
