"""Go on from the newest complete checkpoint, on as many ranks and at the stage there is now."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from launcher.errors import JobFailedError, RunDirError
from launcher.recipe_sections import Recipe
from launcher.run_checkpoints import UNFINISHED
from launcher.run_dir import TRAINER_LOG
from launcher.worker.checkpoints import (
    Checkpoint,
    Layout,
    clear_unfinished,
    find_newest,
)
from launcher.worker.eight_bit_states import is_eight_bit, keep_moments_on_host, round_states
from launcher.worker.universal import STATES, check_convertible, states_folder

logger = logging.getLogger(__name__)

_KEY = "zerofit/checkpoint"
# Converting the states of a large model takes as long as reading and writing them does.
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A checkpoint to go on from."""

    path: Path
    step: int
    is_converted: bool
    """Whether ``path`` is a conversion, which is not needed once it was loaded."""
    is_evaluated: bool
    """Whether the held-out loss of this step is known."""


def agree_on_checkpoint(checkpoints: Path, layout: Layout, *, rank: int) -> Resumption | None:
    """Return what all ranks go on from; rank 0 looks, and converts where it must.

    The others wait at the rendezvous store and not in a collective, which would time out.

    Raises:
        RunDirError: there are checkpoints and none can be used, or not by these ranks.
        JobFailedError: the conversion failed.
    """
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set(_KEY, json.dumps(_find(checkpoints, layout)))
    else:
        store.wait([_KEY], _PATIENCE)
    answer = json.loads(store.get(_KEY))
    if "problem" in answer:
        # Here on every rank, so that it is shown once.
        error = JobFailedError if answer.pop("has_failed") else RunDirError
        raise error(answer["problem"], where=answer["where"], fix=answer["fix"])
    if not answer:
        return None
    return Resumption(**{**answer, "path": Path(answer["path"])})


def _find(checkpoints: Path, layout: Layout) -> dict[str, Any]:
    """Return the fields of a resumption, of an error, or nothing."""
    clear_unfinished(checkpoints)
    found, skipped = find_newest(checkpoints)
    for line in skipped:
        logger.warning("%s", line)
    if found is None:
        if not skipped:
            return {}
        return {
            "problem": f"none of {len(skipped)} checkpoints can be used: {'; '.join(skipped)}",
            "where": str(checkpoints),
            "fix": "remove the folder to start from the beginning",
            "has_failed": False,
        }
    known = {
        "step": found.step,
        "is_evaluated": _is_evaluated(checkpoints.parent / TRAINER_LOG, found.step),
    }
    if found.layout == layout:
        logger.info("continuing from %s", found.path)
        return {"path": str(found.path), "is_converted": False, **known}
    try:
        target = _convert(found, layout)
    except (RunDirError, JobFailedError) as error:
        return {
            "problem": error.problem,
            "where": error.where,
            "fix": error.fix,
            "has_failed": isinstance(error, JobFailedError),
        }
    return {"path": str(target), "is_converted": True, **known}


def _convert(found: Checkpoint, layout: Layout) -> Path:
    check_convertible(found)
    # The present optimizer must be able to take the states up, too.
    check_convertible(replace(found, layout=layout))
    old = found.layout
    logger.info(
        "continuing from %s: converting it from %d rank(s) at ZeRO-%d to %d at ZeRO-%d",
        found.path, old.world_size, old.zero_stage, layout.world_size, layout.zero_stage,
    )  # fmt: skip
    target = found.path.parent / UNFINISHED / f"converted-{found.path.name}"
    # A process of its own: its memory is given back, and is not counted as the rank's.
    done = subprocess.run(
        [sys.executable, "-m", "launcher.worker.universal",
         "--checkpoint", str(found.path), "--out", str(target)],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["(it said nothing)"])[-1]
        sys.stderr.write(done.stderr)
        raise JobFailedError(
            f"the checkpoint could not be converted: {last_line}",
            where=str(found.path),
            fix=f"continue with {old.world_size} ranks at zero_stage {old.zero_stage}",
        )
    return target


def resuming_config(ds_config: Mapping[str, Any], resumption: Resumption | None) -> dict[str, Any]:
    """Return the DeepSpeed configuration, told to load universal states where there are some."""
    config = dict(ds_config)
    is_partitioned = config["zero_optimization"]["stage"] > 0
    if resumption is not None and resumption.is_converted and is_partitioned:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    return config


def evaluates_first(recipe: Recipe, resumption: Resumption | None) -> bool:
    """Return whether to evaluate before the next step.

    A run that begins does so, and one that was stopped before it had made the evaluation that
    belongs to its last step.
    """
    if recipe.data.eval_path is None or resumption is None:
        return recipe.data.eval_path is not None
    every = recipe.optim.eval_steps
    return every is not None and resumption.step % every == 0 and not resumption.is_evaluated


def _is_evaluated(log: Path, step: int) -> bool:
    """Return whether the log of an earlier attempt has the held-out loss of a step."""
    if not log.is_file():
        return False
    lines = log.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return any(entry["step"] == step and "eval_loss" in entry for entry in entries)


def load_converted(engine: Any, resumption: Resumption) -> None:
    """Make the engine's ``load_checkpoint`` read a converted checkpoint.

    The loaders of DeepSpeed 0.19.8 take over all hyperparameters of the saved groups (ZeRO-3:
    those of the first for all, so that norms would decay like weights) and put the step where
    the fused AdamW on a GPU and DeepSpeedCPUAdam do not expect it; 8-bit states they do not know.
    """
    plain_load = engine.load_checkpoint

    def load(*arguments: Any, **options: Any) -> Any:
        kept = [_hyperparameters(group) for group in _base_optimizer(engine).param_groups]
        if is_eight_bit(_base_optimizer(engine)):
            keep_moments_on_host(_base_optimizer(engine))
        if engine.zero_optimization():
            loaded = plain_load(*arguments, **options)
        else:
            loaded = (_load_replicated(engine, states_folder(resumption.path)), {})
        optimizer = _base_optimizer(engine)
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)
        if is_eight_bit(optimizer):
            for parameter in engine.module.parameters():
                if getattr(parameter, "_hp_mapping", None) is not None:
                    parameter._hp_mapping.optim_fragment = None  # views of the fp32 moments
            round_states(optimizer)
            return loaded
        for group in optimizer.param_groups:
            for parameter in _with_state(optimizer, group):
                state = optimizer.state[parameter]
                state["step"] = _step_for(optimizer, group, parameter, state["step"])
        return loaded

    engine.load_checkpoint = load


def _base_optimizer(engine: Any) -> Any:
    """Return the torch optimizer inside DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "lr")}


def _with_state(optimizer: Any, group: Mapping[str, Any]) -> list[Any]:
    """Return the tensors that have states; ZeRO-3 keeps its groups empty between steps."""
    listed = list(group["params"])
    return listed or list(optimizer.state)


def _step_for(optimizer: Any, group: Mapping[str, Any], parameter: Any, step: Any) -> Any:
    if type(optimizer).__name__ == "DeepSpeedCPUAdam":
        return int(step)
    value = torch.as_tensor(step, dtype=torch.float32)
    # torch keeps the step of its fused and capturable variants beside the parameter, that of
    # the others on the host (torch 2.13 optim/adam.py).
    is_beside = group.get("fused") or group.get("capturable")
    return value.clone().to(parameter.device if is_beside else "cpu")


def _load_replicated(engine: Any, states: Path) -> str:
    """Load universal states into stage 0, which DeepSpeed's own loader does not know."""
    optimizer, base = engine.optimizer, _base_optimizer(engine)
    weights = getattr(optimizer, "fp16_groups", None)
    if weights is None:
        weights = [group["params"] for group in base.param_groups]
    masters = getattr(optimizer, "fp32_groups", weights)
    with torch.no_grad():
        for weight_group, master_group in zip(weights, masters, strict=True):
            for weight, master in zip(weight_group, master_group, strict=True):
                folder = states / "zero" / engine.param_names[weight]
                value, *moments = (_read(folder / f"{key}.pt")["param"] for key in STATES)
                master.copy_(value.view_as(master))
                weight.copy_(value.view_as(weight))
                state = base.state[master]
                for key, moment in zip(STATES[1:], moments, strict=True):
                    state[key] = moment.view_as(master).to(master.device, torch.float32)
                state["step"] = _read(folder / "step.pt")
    saved = _read(states / "zero" / "optimizer_state.pt")
    for group, saved_group in zip(base.param_groups, saved["param_groups"], strict=True):
        group["lr"] = saved_group["lr"]
    counters = _read(states / "mp_rank_00_model_states.pt")
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, counters[name])
    return str(states)


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


class RemoveConverted(TrainerCallback):  # type: ignore[misc]
    """Remove a converted checkpoint when every rank has loaded it."""

    def __init__(self, resumption: Resumption) -> None:
        self._resumption = resumption

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Wait for all ranks; rank 0 removes the folder."""
        dist.barrier()
        if state.is_world_process_zero:
            shutil.rmtree(self._resumption.path, ignore_errors=True)
