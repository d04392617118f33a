"""One answer of the model before and after training, for people to compare."""

# Shape suffixes: b = sequences (one), s = tokens.

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from launcher import run_dir
from launcher.data_cache import DataSummary
from launcher.recipe_sections import TrackingSection
from launcher.strategy import Strategy
from launcher.worker.examples import SAMPLE_NEW_TOKENS
from launcher.worker.peak_memory import PeakRecorder

logger = logging.getLogger(__name__)

SAMPLE_SECONDS = 20.0
"""Longest time for one sample answer; what was written until then is kept."""

SAMPLE_BEFORE = "sample_before.json"
"""The first answer as JSON, for attempts that go on from a checkpoint."""


def wants_sample(
    tracking: TrackingSection, summary: DataSummary | None, strategy: Strategy
) -> bool:
    """Return whether answers are to be written; what the recipe says comes first.

    Under ZeRO-3 every token gathers the whole model once more, on all ranks together. Where ranks
    share sequences, one alone may not have the memory for a whole one.
    """
    if summary is None or summary.sample_prompt_ids is None or tracking.sample_answer is False:
        return False
    if tracking.sample_answer is None and strategy.sequence_parallel_size > 1:
        logger.info(
            "no sample answer: each rank would run a whole sequence by itself "
            "(tracking.sample_answer=true writes it all the same)"
        )
        return False
    if tracking.sample_answer is None and strategy.zero_stage == 3:
        logger.info(
            "no sample answer: under ZeRO-3 each of its tokens gathers the whole model "
            "(tracking.sample_answer=true writes it all the same)"
        )
        return False
    return True


class Sample(TrainerCallback):  # type: ignore[misc]
    """The model's answer to the first held-out prompt: as a callback, before the first step."""

    def __init__(
        self, trainer: Any, recorder: PeakRecorder, summary: DataSummary | None, *, folder: Path
    ) -> None:
        self._trainer = trainer
        self._recorder = recorder
        self._summary = summary
        self._path = folder / SAMPLE_BEFORE
        self._before: str | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Ask when the engine exists and no step was taken; later attempts read the answer."""
        if state.global_step > 0:
            if self._path.is_file():
                self._before = json.loads(self._path.read_text(encoding="utf-8"))
            return
        self._before = self.answer()
        if state.is_world_process_zero and self._before is not None:
            run_dir.write_json(self._path, self._before)

    def answer(self) -> str | None:
        """Return the model's greedy answer; under ZeRO-3 all ranks must ask together."""
        if self._summary is None or self._summary.sample_prompt_ids is None:
            return None
        model, tokenizer = self._trainer.model, self._trainer.processing_class
        prompt_bs = torch.tensor(
            [self._summary.sample_prompt_ids], device=self._trainer.args.device
        )
        model.eval()
        with (
            self._recorder.during("eval"),
            self._trainer.whole_sequences(),
            torch.no_grad(),
        ):
            output_bs = model.generate(
                input_ids=prompt_bs,
                attention_mask=torch.ones_like(prompt_bs),
                do_sample=False,
                max_new_tokens=SAMPLE_NEW_TOKENS,
                max_time=SAMPLE_SECONDS,
                use_cache=True,
                pad_token_id=self._summary.pad_token_id,
            )
        answer = output_bs[0, prompt_bs.shape[1] :]
        return str(tokenizer.decode(answer, skip_special_tokens=True))

    def result(self, after: str | None) -> dict[str, str | None] | None:
        """Return the ``sample`` of results.json."""
        if self._summary is None or after is None:
            return None
        return {"prompt": self._summary.sample_prompt, "before": self._before, "after": after}
