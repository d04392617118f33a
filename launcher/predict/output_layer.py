"""What the model's end keeps: final norm, logits and cross-entropy, in each form of the loss.

Source:
    transformers 5.23 ``loss/loss_utils.py:ForCausalLMLoss``; torch 2.13 log_softmax and
    nll_loss; Liger 0.8.5 ``ops/fused_linear_cross_entropy.py``; ``launcher/worker/loss.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.strategy import LOSS_CHUNK_ELEMENTS, Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class LossMoment:
    """One instant of the loss: bytes on top of what the layers keep, and head gradients.

    ``new_gradients`` counts gradients of the whole output matrix that are alive: made in this
    instant, accumulated before it, or both.
    """

    name: str
    logits_bytes: float
    hidden_bytes: float
    head_gradients: int = 0
    is_head_done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLayer:
    """Bytes and sizes that the output layer needs; ``tokens`` are those of one micro-batch."""

    tokens: float
    hidden_size: int
    vocab_size: int
    element_bytes: int
    is_head_trained: bool
    keeps_hidden: bool
    """The output matrix keeps its input: it is trained, or DeepSpeed's ZeRO-3 linear runs it."""
    has_softcap: bool
    adds_gradients_in_place: bool = False
    """The sum of two chunks' gradients of the matrix takes the first one's place: DeepSpeed's
    linear of ZeRO-3 gives a tensor of its own, torch's a view, whose sum is a third tensor (H100,
    Gemma 3 1B, and two H200, Llama-3-8B: one whole matrix less than under ZeRO-2). Parameters on
    the host bring the third back (H100, Qwen3-1.7B); why is not known."""

    @property
    def _hidden_bytes(self) -> float:
        return self.tokens * self.hidden_size * self.element_bytes

    def final_norm_bytes(self, *, is_rms: bool, is_frozen: bool, has_liger: bool) -> float:
        """Return what the final norm keeps until its backward, its output included."""
        hidden = self._hidden_bytes
        if not is_rms or has_liger:
            kept = hidden  # its input, which nothing else keeps
        else:
            kept = self.tokens * self.hidden_size * 4 + 4 * self.tokens
            if not is_frozen:
                kept += hidden  # the normalised value, for the norm's weight
        return kept + (hidden if self.keeps_hidden else 0)

    def moments(self, loss: Loss) -> tuple[LossMoment, ...]:
        """Return the instants from the last hidden state to its gradient."""
        if loss is Loss.full:
            return self._full()
        return self._chunked() if loss is Loss.chunked else self._liger()

    def _full(self) -> tuple[LossMoment, ...]:
        """All logits at once: 10 bytes each forward, 12 backward (bf16 or fp16 model)."""
        count, width = self.tokens * self.vocab_size, self.element_bytes
        hidden = self._hidden_bytes
        upcast = 4 if width != 4 else 0
        # c * tanh(logits / c) in the model's precision keeps tanh's output.
        capped = width if self.has_softcap else 0
        # The last hidden state is still named by the model's forward.
        named = 0 if self.keeps_hidden else hidden
        head = 1 if self.is_head_trained else 0
        return (
            LossMoment(
                name="log-softmax forward",
                logits_bytes=count * (width + upcast + 4 + capped),
                hidden_bytes=named,
            ),
            LossMoment(
                name="cross-entropy backward",
                logits_bytes=count * (4 + 4 + 4 + capped),
                hidden_bytes=0,
            ),
            LossMoment(
                name="output layer backward",
                logits_bytes=count * width,
                hidden_bytes=hidden,
                head_gradients=head,
            ),
            LossMoment(
                name="output layer gradient hook",
                logits_bytes=0,
                hidden_bytes=hidden,
                head_gradients=head,
                is_head_done=True,
            ),
        )

    def _chunked(self) -> tuple[LossMoment, ...]:
        chunks = max(1, math.ceil(self.tokens * self.vocab_size / LOSS_CHUNK_ELEMENTS))
        count = math.ceil(self.tokens / chunks) * self.vocab_size
        width, hidden = self.element_bytes, self._hidden_bytes
        capped = 4 if self.has_softcap else 0
        named = 0 if self.keeps_hidden else hidden  # each checkpoint keeps its chunk
        head = 1 if self.is_head_trained else 0
        pending = head if chunks > 1 else 0
        gradient = hidden if chunks > 1 else 0
        return (
            LossMoment(
                name="chunk cross-entropy backward",
                logits_bytes=count * (12 + capped),
                hidden_bytes=named + gradient,
                head_gradients=pending,
            ),
            LossMoment(
                name="chunk output layer backward",
                logits_bytes=count * width,
                hidden_bytes=named + gradient + hidden / chunks,
                head_gradients=pending + head,
            ),
            LossMoment(
                name="sum of the chunks' output layer gradients",
                logits_bytes=0,
                hidden_bytes=named + gradient + hidden / chunks,
                head_gradients=(2 if self.adds_gradients_in_place else 3) * pending,
            ),
            # A slice's gradient is a tensor of zeros for the whole, then added.
            LossMoment(
                name="chunk gradient",
                logits_bytes=0,
                hidden_bytes=named + gradient + hidden + hidden / chunks,
                head_gradients=head,
            ),
            LossMoment(
                name="output layer gradient hook",
                logits_bytes=0,
                hidden_bytes=hidden,
                head_gradients=head,
                is_head_done=True,
            ),
        )

    def _liger(self) -> tuple[LossMoment, ...]:
        parts = math.ceil(self.vocab_size / self.hidden_size)
        chunk = min(2 ** math.ceil(math.log2(max(1, math.ceil(self.tokens / parts)))), self.tokens)
        width, hidden = self.element_bytes, self._hidden_bytes
        named = 0 if self.keeps_hidden else hidden
        head = 1 if self.is_head_trained else 0
        return (
            LossMoment(
                name="fused cross-entropy forward",
                logits_bytes=chunk * self.vocab_size * width,
                hidden_bytes=named + hidden + chunk * self.hidden_size * width * (1 - head),
                head_gradients=head,  # each chunk's is added by the matrix product itself
            ),
            LossMoment(
                name="output layer gradient hook",
                logits_bytes=0,
                hidden_bytes=hidden,
                head_gradients=head,
                is_head_done=True,
            ),
        )

    def evaluation_bytes(self, loss: Loss) -> float:
        """Return the most that the loss needs without gradients."""
        count, width = self.tokens * self.vocab_size, self.element_bytes
        if loss is Loss.chunked:
            chunks = max(1, math.ceil(count / LOSS_CHUNK_ELEMENTS))
            count = math.ceil(self.tokens / chunks) * self.vocab_size
        if loss is Loss.liger:
            return self.moments(loss)[0].logits_bytes
        return count * ((width + 8) if width != 4 else 8)
