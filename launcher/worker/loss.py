"""Cross-entropy that never holds the logits of a whole batch."""

# Shape suffixes: b = sequences, s = tokens of a sequence, h = hidden size, t = b * s tokens,
# c = tokens of one chunk, v = vocabulary.

from __future__ import annotations

import types
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from launcher.errors import ModelError
from launcher.strategy import LOSS_CHUNK_ELEMENTS
from launcher.worker.model_facts import decoder_of
from launcher.worker.tokenization import IGNORE_INDEX


def num_loss_chunks(*, max_tokens: int, vocab_size: int) -> int:
    """Return how many chunks keep each at or below ``LOSS_CHUNK_ELEMENTS`` logits.

    Args:
        max_tokens: most tokens of one micro-batch, padding included.
        vocab_size: rows of the output layer.
    """
    return max(1, -(-max_tokens * vocab_size // LOSS_CHUNK_ELEMENTS))


def chunked_cross_entropy(
    hidden_bsh: torch.Tensor,
    targets_bs: torch.Tensor,
    output_layer: torch.nn.Module,
    *,
    num_chunks: int,
    logit_softcap: float | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return the causal language-model loss with at most one chunk of logits alive.

    The output layer runs once per chunk in forward and once more in backward, where each
    chunk's logits are computed again. ``num_chunks`` must be the same on every rank: under
    ZeRO-3 each call of the output layer gathers its weight, which all ranks must join, while
    batches differ in length from rank to rank. Chunks may therefore be empty.

    Args:
        hidden_bsh: the decoder's last hidden state.
        targets_bs: for each token the id of the next; ``IGNORE_INDEX`` where it does not count.
        output_layer: maps [c, h] to [c, v].
        num_chunks: into how many parts the tokens are split.
        logit_softcap: ``c`` of ``c * tanh(logits / c)``, for models that have it.
        num_items_in_batch: tokens that count in the whole global batch; ``None`` takes the
            mean over this micro-batch.

    Returns:
        A float32 scalar.
    """
    hidden_th = hidden_bsh.reshape(-1, hidden_bsh.shape[-1])
    targets_t = targets_bs.reshape(-1)

    def chunk_loss(hidden_ch: torch.Tensor, labels_c: torch.Tensor) -> torch.Tensor:
        logits_cv = output_layer(hidden_ch).float()
        if logit_softcap is not None:
            logits_cv = logit_softcap * torch.tanh(logits_cv / logit_softcap)
        return functional.cross_entropy(
            logits_cv, labels_c, ignore_index=IGNORE_INDEX, reduction="sum"
        )

    total = hidden_th.new_zeros((), dtype=torch.float32)
    for hidden_ch, labels_c in zip(
        hidden_th.tensor_split(num_chunks), targets_t.tensor_split(num_chunks), strict=True
    ):
        total = total + checkpoint(chunk_loss, hidden_ch, labels_c, use_reentrant=False)
    if num_items_in_batch is None:
        return total / (targets_t != IGNORE_INDEX).sum().clamp(min=1)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def use_chunked_loss(model: Any, *, max_tokens: int) -> None:
    """Make a causal language model compute its loss in chunks whenever it is given labels.

    With labels the model then returns the loss alone, no logits; without labels, as in
    generation, nothing changes. The model must not be wrapped yet by PEFT.

    Raises:
        ModelError: the model does more to its logits, or adds more to its loss, than
            this loss knows of.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    config = model.config
    unknown = [
        name
        for name in ("logit_scale", "logits_scaling", "output_router_logits", "lm_head_multiplier")
        if getattr(config, name, None) not in (None, False, 1, 1.0)
    ]
    if unknown:
        raise ModelError(
            f"the chunked loss does not know {', '.join(unknown)} of {config.model_type}",
            where="strategy.loss",
            fix="use strategy.loss=full",
        )
    plain_forward = model.forward
    num_chunks = num_loss_chunks(max_tokens=max_tokens, vocab_size=config.vocab_size)

    def forward(
        self: Any,
        input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return plain_forward(input_ids=input_ids, **kwargs)
        if shift_labels is None:
            shift_labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        hidden_bsh = decoder_of(self)(input_ids=input_ids, **kwargs).last_hidden_state
        loss = chunked_cross_entropy(
            hidden_bsh,
            shift_labels,
            self.get_output_embeddings(),
            num_chunks=num_chunks,
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            num_items_in_batch=num_items_in_batch,
        )
        return CausalLMOutputWithPast(loss=loss)

    model.forward = types.MethodType(forward, model)
    # The trainer passes num_items_in_batch only to models that say they take it.
    model.accepts_loss_kwargs = True
