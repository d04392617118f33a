"""Sequence parallelism (Ulysses): a group of ranks shares each sequence, and each its heads."""

# Shape suffixes: p = ranks of a group, b = sequences, s = tokens of a sequence, l = s / p tokens of
# a rank's part, n = heads, d = head size.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.utils.data import DataLoader

from launcher.errors import ModelError
from launcher.strategy import Attention, Strategy
from launcher.worker.tokenization import IGNORE_INDEX


def share_sequences(model: Any, strategy: Strategy) -> SequenceGroup | None:
    """Make the model's attention work in groups of ranks where the plan says so.

    Raises:
        ModelError: attention of this model cannot be shared in such groups.
    """
    if strategy.sequence_parallel_size == 1:
        return None
    group = SequenceGroup(strategy.sequence_parallel_size)
    group.share_attention(model, strategy.attention)
    return group


class SequenceGroup:
    """The ranks that work on the same sequences: ``size`` neighbours, of one node where they can.

    Outside attention every rank computes its own part of the tokens. In attention it has all of
    them for its share of the heads: an all-to-all before and after changes one for the other.
    To ZeRO the ranks stay data-parallel: each part's loss is its sum over the tokens of the whole
    global batch, so that averaging gradients over all ranks gives the gradient of the mean.

    Source: DeepSpeed Ulysses, arXiv:2309.14509, section 3.
    """

    def __init__(self, size: int) -> None:
        """Form the groups; all ranks must do this together."""
        self.size = size
        self.index = dist.get_rank() // size
        """Of this rank's group: which share of the samples it reads."""
        self.num_groups = dist.get_world_size() // size
        self.part = dist.get_rank() % size
        """Which part of each sequence is this rank's."""
        self._is_paused = False
        members = [list(range(i * size, (i + 1) * size)) for i in range(self.num_groups)]
        groups = [dist.new_group(ranks) for ranks in members]
        self._group = groups[self.index]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let this rank run whole sequences by itself, as generation does."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def deal(self, batches: DataLoader[Any], device: torch.device) -> DataLoader[Any]:
        """Return this group's part of held-out batches, the same on all of its ranks."""
        from accelerate.data_loader import prepare_data_loader

        dealt: DataLoader[Any] = prepare_data_loader(
            batches,
            device,
            num_processes=self.num_groups,
            process_index=self.index,
            put_on_device=True,
        )
        return dealt

    def share_attention(self, model: Any, attention: Attention) -> None:
        """Put the exchange of tokens for heads around the model's attention function.

        Raises:
            ModelError: attention of this model cannot be shared in such a group.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._check(model, attention)
        attend = ALL_ATTENTION_FUNCTIONS[attention.value]
        ALL_ATTENTION_FUNCTIONS[attention.value] = self._around(
            attend, has_windows=attention is Attention.flash_attention_2
        )

    def _check(self, model: Any, attention: Attention) -> None:
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        problem = None
        if attention is Attention.eager:
            problem = "eager attention needs a mask of whole sequences"
        elif not model._supports_attention_backend:
            problem = f"{type(model).__name__} calls its attention kernel itself"
        elif heads % self.size or (key_heads % self.size and self.size % key_heads):
            problem = f"{heads} heads and {key_heads} key heads cannot be shared evenly"
        elif _stretches_positions(config):
            problem = "its position encoding depends on the sequence's length"
        if problem is not None:
            raise ModelError(
                problem, where=f"strategy.sequence_parallel_size = {self.size}",
                fix="use a size of 1, or leave it out: the planner knows which sizes work",
            )  # fmt: skip

    def _around(self, attend: Callable[..., Any], *, has_windows: bool) -> Callable[..., Any]:
        def shared(
            module: Any,
            query_bnld: torch.Tensor,
            key_bnld: torch.Tensor,
            value_bnld: torch.Tensor,
            attention_mask: torch.Tensor | None,
            **options: Any,
        ) -> tuple[torch.Tensor, Any]:
            if self._is_paused:
                whole: tuple[torch.Tensor, Any] = attend(
                    module, query_bnld, key_bnld, value_bnld, attention_mask, **options
                )
                return whole
            num_tokens = query_bnld.shape[2] * self.size
            window = options.get("sliding_window")
            has_window = window is not None and window < num_tokens and not has_windows
            if attention_mask is not None or has_window:
                raise ModelError(
                    f"{type(module).__name__} needs an attention mask, made for this rank's part",
                    where=f"strategy.sequence_parallel_size = {self.size}",
                    fix="use a size of 1, or flash_attention_2 for a sliding window",
                )
            # Of this rank's part; kernels look for packed sequences in them.
            options.pop("position_ids", None)
            copies = max(1, self.size // key_bnld.shape[1])
            if copies > 1:
                key_bnld = key_bnld.repeat_interleave(copies, dim=1)
                value_bnld = value_bnld.repeat_interleave(copies, dim=1)
            query_bnsd = self._all_tokens(query_bnld)
            key_bnsd, value_bnsd = self._all_tokens(key_bnld), self._all_tokens(value_bnld)
            groups = getattr(module, "num_key_value_groups", None)
            if groups is not None:
                module.num_key_value_groups = query_bnsd.shape[1] // key_bnsd.shape[1]
            context_bsnd, weights = attend(
                module, query_bnsd, key_bnsd, value_bnsd, None, **options
            )
            if groups is not None:
                module.num_key_value_groups = groups
            return self._all_heads(context_bsnd), weights

        return shared

    def _all_tokens(self, heads_bnld: torch.Tensor) -> torch.Tensor:
        """Return all tokens [b, n / p, s, d] of this rank's heads."""
        return self._exchanged(heads_bnld).movedim(0, 2).flatten(2, 3)

    def _all_heads(self, tokens_bsnd: torch.Tensor) -> torch.Tensor:
        """Return all heads [b, l, n, d] of this rank's tokens."""
        return self._exchanged(tokens_bsnd).movedim(0, 2).flatten(2, 3)

    def _exchanged(self, tensor: torch.Tensor) -> torch.Tensor:
        """Divide dimension 1 among the ranks; return this rank's share from each, [p, b, ...]."""
        shape = (tensor.shape[0], self.size, tensor.shape[1] // self.size, *tensor.shape[2:])
        parts = tensor.reshape(shape).movedim(1, 0).contiguous()
        received: torch.Tensor = _Exchange.apply(parts, self._group)  # type: ignore[no-untyped-call]
        return received


class _Exchange(torch.autograd.Function):
    """Send part i of the first dimension to the group's rank i; its gradients come back so."""

    @staticmethod
    def forward(context: Any, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        context.group = group
        return _exchange(parts, group)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(gradient.contiguous(), context.group), None


def _exchange(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def _stretches_positions(config: Any) -> bool:
    """Return whether rotations depend on the largest position, which each part has its own of.

    Source: transformers 5.23 ``modeling_rope_utils.py:dynamic_rope_update``.
    """
    found = getattr(config, "rope_parameters", None) or {}
    # By kind of layer where they differ (Gemma 3).
    each = [found, *(value for value in found.values() if isinstance(value, Mapping))]
    return any(item.get("rope_type") in ("dynamic", "longrope") for item in each)


class CutSequences:
    """Collate a batch and keep this rank's part of each sequence.

    Labels are shifted before the cut: the last token of a part predicts the first of the next.
    transformers takes such targets as ``shift_labels``, where ``labels`` only says that a loss
    is wanted (5.23 ``loss/loss_utils.py:ForCausalLMLoss``).
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]],
        group: SequenceGroup,
    ) -> None:
        self._collate = collate
        self._group = group

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ids and targets, int64 [b, l], and positions in the whole sequence, [1, l]."""
        batch = self._collate(examples)
        tokens_bs = batch["input_ids"]
        num_tokens = tokens_bs.shape[1]
        targets_bs = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        length = num_tokens // self._group.size
        mine = slice(self._group.part * length, (self._group.part + 1) * length)
        targets_bl = targets_bs[:, mine].contiguous()
        return {
            "input_ids": tokens_bs[:, mine].contiguous(),
            "position_ids": torch.arange(num_tokens)[None, mine],
            "labels": targets_bl,
            "shift_labels": targets_bl,
        }
