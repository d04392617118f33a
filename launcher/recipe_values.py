"""Values of a recipe that no run could use, each with a line that says so."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from launcher.errors import did_you_mean
from launcher.recipe_sections import (
    DATA_COLUMNS,
    TRACKERS,
    DataSection,
    Recipe,
    StrategySection,
    TrackingSection,
)
from launcher.strategy import Offload


def _impossible_paths(recipe: Recipe) -> Iterator[str]:
    """Yield a line per path that no file system can hold, or of a user who is not known."""
    data = recipe.data
    paths = {
        "model.name_or_path": recipe.model.name_or_path,
        "data.path": data.path,
        "data.eval_path": data.eval_path,
        "data.chat_template": data.chat_template,
    } | {f"data.sources[{i}].path": item.path for i, item in enumerate(data.sources)}
    for key, path in paths.items():
        if path is None:
            continue
        try:
            os.lstat(Path(path).expanduser())
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                yield f"{key} is {path[:40]!r}…, too long for the name of a file"
        except ValueError:
            yield f"{key} is {path[:40]!r}, no name of a file"
        except RuntimeError:
            yield f"{key} is {path!r}: there is no such user here"


def impossible_values(recipe: Recipe) -> Iterator[str]:
    """Yield one line per value that no run could use."""
    positive: dict[str, float | None] = {
        "max_seq_len": recipe.max_seq_len,
        "model.max_position_embeddings": recipe.model.max_position_embeddings,
        "optim.global_batch_size": recipe.optim.global_batch_size,
        "optim.learning_rate": recipe.optim.learning_rate,
        "optim.num_train_epochs": recipe.optim.num_train_epochs,
        "optim.max_steps": recipe.optim.max_steps,
        "optim.logging_steps": recipe.optim.logging_steps,
        "optim.eval_steps": recipe.optim.eval_steps,
        "optim.save_steps": recipe.optim.save_steps,
        "optim.save_total_limit": recipe.optim.save_total_limit,
        "optim.max_grad_norm": recipe.optim.max_grad_norm,
        "lora.r": recipe.lora.r,
        "lora.alpha": recipe.lora.alpha,
        "cluster.num_nodes": recipe.cluster.num_nodes,
        "cluster.gpus_per_node": recipe.cluster.gpus_per_node,
        "cluster.host_memory_gib": recipe.cluster.host_memory_gib,
        "cluster.inter_node_gbit_per_s": recipe.cluster.inter_node_gbit_per_s,
        "cluster.price_per_gpu_hour": recipe.cluster.price_per_gpu_hour,
        "recovery.max_attempts": recipe.recovery.max_attempts,
        "recovery.min_nodes": recipe.recovery.min_nodes,
        "slurm.cpus_per_task": recipe.slurm.cpus_per_task,
        "slurm.signal_seconds": recipe.slurm.signal_seconds,
        "tracking.memory_snapshot_step": recipe.tracking.memory_snapshot_step,
        "data.max_train_samples": recipe.data.max_train_samples,
        "data.max_eval_samples": recipe.data.max_eval_samples,
    }
    for index, given in enumerate(recipe.data.sources):
        positive |= {
            f"data.sources[{index}].weight": given.weight,
            f"data.sources[{index}].max_samples": given.max_samples,
        }
    for key in ("micro_batch_size_per_gpu", "sequence_parallel_size"):
        smallest = min(recipe.strategy.choices(key, (1,)))
        positive[f"strategy.{key}"] = smallest
    yield from _impossible_data(recipe.data)
    yield from _impossible_paths(recipe)
    for key, value in positive.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield f"{key} is {value}, it must be a number above 0"
    for key in ("watchdog_seconds", "phase_seconds"):
        value = getattr(recipe.recovery, key)
        if value is not None and not 0 <= value < math.inf:
            yield f"recovery.{key} is {value}, it must be a number of seconds, or 0 for no limit"
    if not 0 <= recipe.lora.dropout < 1:
        yield f"lora.dropout is {recipe.lora.dropout}, it must be at least 0 and below 1"
    if not 0 <= recipe.optim.warmup_ratio <= 1:
        yield f"optim.warmup_ratio is {recipe.optim.warmup_ratio}, it must be between 0 and 1"
    if not 0 <= recipe.optim.weight_decay < math.inf:
        yield f"optim.weight_decay is {recipe.optim.weight_decay}, it must not be negative"
    for key, beta in (("1", recipe.optim.adam_beta1), ("2", recipe.optim.adam_beta2)):
        if not 0 <= beta < 1:
            yield f"optim.adam_beta{key} is {beta}, it must be at least 0 and below 1"
    if not recipe.lora.target_modules:
        yield "lora.target_modules is empty, name modules or use all-linear"
    yield from _impossible_tracking(recipe.tracking, last_step=recipe.optim.max_steps)
    yield from _not_keys(recipe.recovery.chosen)
    yield from _impossible_strategy(recipe.strategy)


def _impossible_tracking(tracking: TrackingSection, *, last_step: int | None) -> Iterator[str]:
    for name in set(tracking.report_to) - set(TRACKERS):
        yield f"tracking.report_to: there is no {name!r}: {did_you_mean(name, TRACKERS)}"
    step = tracking.memory_snapshot_step
    if step is not None and last_step is not None and step > last_step:
        yield f"tracking.memory_snapshot_step is {step}, after optim.max_steps {last_step}"


def _not_keys(chosen: tuple[str, ...]) -> Iterator[str]:
    keys = [item.name for item in fields(StrategySection)]
    for name in set(chosen) - set(keys):
        yield f"recovery.chosen: strategy has no key {name!r}: {did_you_mean(name, keys)}"


def _impossible_strategy(strategy: StrategySection) -> Iterator[str]:
    if strategy.zero_stage in (0, 1, 2) and strategy.offload_param not in (None, Offload.none):
        yield f"strategy.offload_param needs zero_stage 3, not {strategy.zero_stage}"
    if strategy.zero_stage == 0 and strategy.offload_optimizer not in (None, Offload.none):
        yield "strategy.offload_optimizer needs zero_stage 1, 2 or 3, not 0"
    given = strategy.given()
    places = [given.get(key, ()) for key in ("offload_optimizer", "offload_param")]
    nvme = any(
        Offload.nvme in (place if isinstance(place, tuple) else (place,)) for place in places
    )
    if nvme and strategy.nvme_path is None:
        yield "strategy.nvme_path is missing: offload to nvme needs a folder on the drive"
    if strategy.offload_optimizer is Offload.nvme and strategy.zero_stage in (1, 2):
        yield f"optimizer offload to nvme needs zero_stage 3, not {strategy.zero_stage}"


def _impossible_data(data: DataSection) -> Iterator[str]:
    if data.path is not None and data.sources:
        yield "data.path and data.sources are both set; name all sources in data.sources"
    if data.sources and data.max_train_samples is not None:
        yield "data.max_train_samples goes with data.path; use max_samples in data.sources"
    for index, item in enumerate(data.sources):
        if item.path == "???":
            yield f"data.sources[{index}].path is missing"
    columns = {"data.columns": data.columns}
    columns |= {f"data.sources[{i}].columns": item.columns for i, item in enumerate(data.sources)}
    for key, mapping in columns.items():
        for ours, theirs in mapping.items():
            if not isinstance(theirs, str):
                yield f"{key}.{ours} is {theirs!r}, not the name of a column"
            if ours not in DATA_COLUMNS:
                yield f"{key}: no format has a column {ours!r}: {did_you_mean(ours, DATA_COLUMNS)}"
