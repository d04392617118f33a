"""Batches: synthetic sequences, padding, and the order of examples."""

# Shape suffixes: b = sequences, s = tokens of the longest one.

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from launcher.worker.tokenization import IGNORE_INDEX


class RandomTokens(Dataset[dict[str, Any]]):
    """Sequences of exactly ``max_seq_len`` random tokens: for measuring, never for results."""

    def __init__(self, *, num_examples: int, max_seq_len: int, vocab_size: int, seed: int) -> None:
        self._num_examples = num_examples
        self._max_seq_len = max_seq_len
        self._vocab_size = vocab_size
        self._seed = seed

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self._seed + index)
        tokens = torch.randint(self._vocab_size, (self._max_seq_len,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


class RightPadding:
    """Pad examples on the right to the longest of the batch, without an attention mask.

    None is needed: a causal model's real tokens never look at what stands to their right, and
    padding carries no label. Without a mask, attention takes the kernels that build none (torch
    SDPA with ``is_causal``, FlashAttention without unpadding); with one, SDPA leaves the
    FlashAttention kernel and needs a mask of s x s.
    """

    def __init__(self, *, pad_token_id: int, multiple_of: int = 1) -> None:
        self._pad_token_id = pad_token_id
        self._multiple_of = multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``labels``, int64 [b, s]."""
        longest = max(len(example["input_ids"]) for example in examples)
        longest = -(-longest // self._multiple_of) * self._multiple_of
        tokens_bs = torch.full((len(examples), longest), self._pad_token_id)
        labels_bs = torch.full((len(examples), longest), IGNORE_INDEX)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            tokens_bs[row, :length] = torch.as_tensor(example["input_ids"])
            labels_bs[row, :length] = torch.as_tensor(example["labels"])
        return {"input_ids": tokens_bs, "labels": labels_bs}


class PackedRows:
    """Batch packed sequences, each token with its position in its own example.

    From positions that start anew, transformers finds the examples' borders: SDPA and eager
    attention get a mask that keeps them apart (5.23 ``masking_utils.py:create_causal_mask``),
    of s x s for each row. FlashAttention takes the examples' lengths instead, of one row only
    (``modeling_flash_attention_utils.py:_is_packed_sequence``), so there the rows become one.
    """

    def __init__(self, *, pad_token_id: int, is_one_row: bool) -> None:
        self._padding = RightPadding(pad_token_id=pad_token_id)
        self._is_one_row = is_one_row

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``labels`` and ``position_ids``, int64 [b, s] or [1, b * s].

        Held-out examples are not packed; they are padded as ever.
        """
        rows = list(examples)
        if "example_lengths" not in rows[0]:
            return self._padding(rows)
        if self._is_one_row:
            names = ("input_ids", "labels", "example_lengths")
            rows = [{name: np.concatenate([row[name] for row in rows]) for name in names}]
        batch = self._padding(rows)
        longest = batch["input_ids"].shape[1]
        positions_bs = torch.zeros((len(rows), longest), dtype=torch.int64)
        for row, example in enumerate(rows):
            lengths = [int(length) for length in example["example_lengths"]]
            # Padding counts as one more example: no real token shall see it as its own.
            lengths.append(longest - sum(lengths))
            positions_bs[row] = torch.cat([torch.arange(length) for length in lengths])
        return {**batch, "position_ids": positions_bs}


class LongestFirst(Sampler[int]):
    """Batches of like length in random order, the longest example in the first batch.

    What does not fit in memory fails in step 1, and little of a batch is padding. Unlike
    transformers' sampler, whose permutation (``get_length_grouped_indices``) it uses, the order
    depends on the seed and the epoch alone: every rank computes the same one, and a resumed
    run continues it.
    """

    def __init__(self, lengths: Sequence[int], *, group_size: int, seed: int) -> None:
        self._lengths = list(lengths)
        self._group_size = group_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(
            get_length_grouped_indices(self._lengths, self._group_size, generator=generator)
        )


class RankBatches(Sampler[list[int]]):
    """A share's micro-batches: which examples a step takes depends on no number of ranks.

    Each rank has a share, or each group of ranks that work on the same sequences.

    Step ``k`` of an epoch takes the examples ``[k * B, (k + 1) * B)`` of the order, ``B`` being
    the global batch size; ranks and micro-batches only deal them out. The last step of an epoch
    is filled up from the order's beginning, so that it has ``B`` examples too. A run that goes
    on with other ranks or another micro-batch therefore sees the same steps.

    It stands in for accelerate's sharding, whose ``skip_first_batches`` loses the epoch on the
    way to the sampler when there are several ranks (accelerate 1.15
    ``data_loader.py:DataLoaderShard.set_epoch``), and whose last step depends on their number.
    """

    def __init__(
        self,
        order: Sampler[int],
        *,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        share: int,
        num_shares: int,
    ) -> None:
        self._order = order
        self._micro_batch_size = micro_batch_size
        self._micro_batches_per_step = gradient_accumulation_steps * num_shares
        self._share = share
        self._num_shares = num_shares
        self.of_this_step: deque[list[int]] = deque(maxlen=gradient_accumulation_steps)
        """Examples of the micro-batches that were dealt out last."""

    @property
    def batch_sampler(self) -> RankBatches:
        """Itself: transformers looks for ``set_epoch`` one level down (5.23 trainer.py)."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        if isinstance(self._order, LongestFirst):
            self._order.set_epoch(epoch)

    def __len__(self) -> int:
        global_batch_size = self._micro_batch_size * self._micro_batches_per_step
        num_steps = -(-len(self._order) // global_batch_size)  # type: ignore[arg-type]
        return num_steps * self._micro_batches_per_step // self._num_shares

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self._order)
        for index in range(len(self)):
            first = (index * self._num_shares + self._share) * self._micro_batch_size
            batch = [order[i % len(order)] for i in range(first, first + self._micro_batch_size)]
            self.of_this_step.append(batch)
            yield batch
