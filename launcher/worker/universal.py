"""Convert a checkpoint for other ranks or another ZeRO stage: DeepSpeed's universal format.

Run it as ``python -m launcher.worker.universal --checkpoint DIR --out DIR``; one process, beside
the ranks, so that nobody waits for it in a collective.

DeepSpeed's own converter puts the shards together. What its loaders then lack is added here
(deepspeed 0.19.8): ZeRO-3's tensors without shape or step, which stages 1 and 2 cannot load; the
optimizer's global state, which each stage expects in another place; and stage 0, which it does
not convert at all.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, RunDirError
from launcher.run_checkpoints import why_bound_to_layout
from launcher.worker.checkpoints import Checkpoint, read_checkpoint
from launcher.worker.eight_bit_states import MOMENTS, fp32_state, write_with_fp32_moments
from launcher.worker.program import begin_program, collect_garbage_from_now_on, run_program
from launcher.worker.weights_only import load_weights_only

logger = logging.getLogger("launcher.worker.universal")

STATES = ("fp32", *MOMENTS)
"""Tensors of each parameter: the master weight and Adam's two moments."""
_TRAINER_FILES = ("trainer_state.json", "scheduler.pt", "rng_state*.pth")
_MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""What stages 1 and 2, and stage 3, look for; only counters are read from it."""
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size")


def convert(checkpoint: Checkpoint, out: Path) -> Path:
    """Write a checkpoint of the trainer's layout whose states any number of ranks can load.

    Args:
        checkpoint: what a run of another layout saved.
        out: a folder to make, replaced if it exists.

    Returns:
        The folder with the universal states, below ``out``.

    Raises:
        RunDirError: the optimizer's states cannot be converted.
    """
    check_convertible(checkpoint)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for pattern in _TRAINER_FILES:
        for path in checkpoint.path.glob(pattern):
            shutil.copy2(path, out)
    source = _states_folder(checkpoint.path)
    states = out / f"{source.name}_universal"
    counters = _read(next(iter(sorted(source.glob("*model_states.pt")))))
    if checkpoint.layout.zero_stage == 0:
        groups = _split_replicated(counters, checkpoint.parameter_groups, states)
    elif "8bit" in checkpoint.layout.optimizer:
        rounded, source = source, out / "fp32_moments"
        write_with_fp32_moments(rounded, source)
        groups = _merge_shards(source, states)
        shutil.rmtree(source)
    else:
        groups = _merge_shards(source, states)
    _save({"param_groups": groups, "ds_version": counters["ds_version"]} | _steps(states, groups),
          states / "zero" / "optimizer_state.pt")  # fmt: skip
    small = {name: counters.get(name) for name in _COUNTERS}
    for name in _MODEL_STATES:
        for path in states.glob(name):
            path.unlink()
        _save({"module": {}, "lr_scheduler": None, **small}, states / name)
    for path in states.glob("*_model_states.pt"):
        if path.name not in _MODEL_STATES:
            path.unlink()
    (out / "latest_universal").write_text(states.name, encoding="utf-8")
    return states


def check_convertible(checkpoint: Checkpoint) -> None:
    """Raise RunDirError for states that only the same ranks and stage can load."""
    layout = checkpoint.layout
    reason = why_bound_to_layout(offload_optimizer=layout.offload_optimizer)
    if reason is not None:
        raise RunDirError(
            f"this checkpoint cannot be used by other ranks or another ZeRO stage: {reason}",
            where=str(checkpoint.path),
            fix=f"continue with {layout.world_size} ranks, zero_stage {layout.zero_stage} and "
            "the same optimizer and offload",
        )


def states_folder(converted: Path) -> Path:
    """Return the folder with the universal states of what :func:`convert` wrote."""
    return converted / (converted / "latest_universal").read_text(encoding="utf-8")


def _states_folder(checkpoint: Path) -> Path:
    return checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()


def _merge_shards(source: Path, states: Path) -> list[dict[str, Any]]:
    """Let DeepSpeed merge the ranks' shards; return the optimizer's parameter groups."""
    from deepspeed.checkpoint import ds_to_universal

    shapes = _shapes(source)
    # One process: memory stays that of one rank's file, and nothing forks a torch process.
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(states),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(
        nowhere
    ):  # fmt: skip
        ds_to_universal.main(options)
    optimizer_state = _read(next(iter(sorted(source.glob("*optim_states.pt")))))
    optimizer_state = optimizer_state["optimizer_state_dict"]
    base = optimizer_state.get("base_optimizer_state") or optimizer_state["optimizer_state_dict"]
    step = float(base["state"][0]["step"])
    for name, shape in shapes.items():
        folder = states / "zero" / name
        for state in STATES:
            tensor = _read(folder / f"{state}.pt")
            tensor = tensor["param"] if isinstance(tensor, Mapping) else tensor
            _save({"param": tensor.reshape(shape), "cat_dim": 0}, folder / f"{state}.pt")
        _save_step(step, folder)
    return [_without_parameters(group) for group in base["param_groups"]]


def _split_replicated(
    saved: Mapping[str, Any], names: Sequence[Sequence[str]], states: Path
) -> list[dict[str, Any]]:
    """Write the states of stage 0, where each rank has all of them, one parameter a folder."""
    optimizer = saved["optimizer"]
    masters = optimizer.get("fp32_groups")  # of 16-bit training; else the weights themselves
    base = optimizer.get("optimizer_state_dict", optimizer)
    for group_index, (group, group_names) in enumerate(
        zip(base["param_groups"], names, strict=True)
    ):
        for place, (number, name) in enumerate(zip(group["params"], group_names, strict=True)):
            state = fp32_state(base["state"][number])
            folder = states / "zero" / name
            weight = masters[group_index][place] if masters else saved["module"][name]
            tensors = (weight.detach().float(), state["exp_avg"], state["exp_avg_sq"])
            for key, tensor in zip(STATES, tensors, strict=True):
                value = tensor.reshape(saved["module"][name].shape).clone()
                _save({"param": value, "cat_dim": 0}, folder / f"{key}.pt")
            _save_step(float(state["step"]), folder)
    return [_without_parameters(group) for group in base["param_groups"]]


def _shapes(source: Path) -> dict[str, Any]:
    """Return the shape of every trained parameter by name."""
    saved = _read(next(iter(sorted(source.glob("*model_states.pt")))))
    return {name: shape for group in saved["param_shapes"] for name, shape in group.items()}


def _steps(states: Path, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the step where ZeRO-3's loader looks for it; stages 1 and 2 have their own files."""
    path = next((states / "zero").rglob("step.pt"))
    nested = {"state": {0: {"step": _read(path)}}, "param_groups": groups}
    return {"optimizer_state_dict": nested}


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"} | {"params": []}


def _save_step(step: float, folder: Path) -> None:
    import torch

    _save(torch.tensor(step, dtype=torch.float32), folder / "step.pt")


def _save(value: Any, path: Path) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def _read(path: Path) -> Any:
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one checkpoint and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.universal")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    begin_program()
    load_weights_only()
    collect_garbage_from_now_on()
    try:
        convert(read_checkpoint(options.checkpoint), options.out)
    except LauncherError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    run_program(main)
