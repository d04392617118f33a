"""The next plan after memory ran out: the same training, with less of what was too full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from launcher.failure_kind import FailureKind
from launcher.planning.ceiling import Ceiling
from launcher.planning.plan import Plan
from launcher.post_mortem import PostMortem, read_post_mortems
from launcher.predict.memory import MemoryEstimate, Phase, estimate_memory
from launcher.prepare import Prepared, prepare
from launcher.recipe_sections import Recipe, StrategySection
from launcher.run_checkpoints import newest_checkpoint
from launcher.strategy import Offload, Strategy

_RUNG_FRACTION = 0.95
"""The first rung needs this share of the last plan at most, as on the planner's own ladder; each
further one steps twice as far, so that a prediction that is far off costs few attempts."""

# Given up after the micro-batch, which changes nothing but memory and time. What would change the
# numbers of the training (optimizer, precision of gradients, attention) is not in the list.
_MEMORY_SAVINGS = (
    "zero_stage", "offload_optimizer", "offload_param", "gradient_checkpointing", "loss",
    "sequence_parallel_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """What the ladder offers."""

    prepared: Prepared
    """Fits when there is a rung; else it says in its suggestions what would."""
    changes: Mapping[str, tuple[Any, Any]]
    """Fields of the strategy that differ: before, after."""
    given_up: tuple[str, ...] = ()
    """Those that the recipe had set."""


def next_rung(
    run_dir: Path,
    prepared: Prepared,
    *,
    kind: FailureKind,
    phase: str | None,
    num_earlier: int,
) -> Rung:
    """Return the fastest plan that needs less of the memory that ran out.

    Global batch size, order of the data, schedule, method and precision stay. The micro-batch is
    free, whatever the recipe says; other fields that the recipe sets are kept where that is
    possible, and given up where it is not and the recipe allows it.

    Args:
        run_dir: of the run; with a checkpoint in it, only plans that can load it count.
        prepared: what ran out of memory.
        kind: whose memory it was.
        phase: in which it ran out; ``None`` when nobody could say.
        num_earlier: how many attempts had run out of memory before.
    """
    recipe = prepared.recipe
    # Predicted again: since the failed plan was made, the data's longest sequence may be known.
    place = prepare(recipe, source=str(run_dir)).plan
    ceiling = ceiling_after(
        estimate_memory(place.workload, prepared.plan.strategy, place.cluster),
        kind,
        phase,
        limit_bytes=place.limit_bytes,
        num_earlier=num_earlier,
        found=read_post_mortems(run_dir),
    )
    found = prepared
    for fixed in what_may_change(recipe):
        section = loadable(fixed, prepared.plan.strategy, run_dir)
        found = prepare(replace(recipe, strategy=section), source=str(run_dir), ceiling=ceiling)
        if found.plan.fits:
            break
    changes = changed_fields(prepared.plan.strategy, found.plan.strategy)
    return Rung(
        prepared=replace(found, recipe=with_plan(recipe, found.plan)),
        changes=changes,
        given_up=tuple(
            sorted(
                name
                for name in changes.keys() & set_by_hand(recipe)
                if not recipe.strategy.permits(name, getattr(found.plan.strategy, name))
            )
        ),
    )


def changed_fields(before: Strategy, after: Strategy) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two strategies, bucket sizes left out."""
    found = {}
    for item in fields(Strategy):
        old, new = getattr(before, item.name), getattr(after, item.name)
        if old != new and item.name != "zero":
            found[item.name] = (getattr(old, "value", old), getattr(new, "value", new))
    return found


def ceiling_after(
    memory: MemoryEstimate,
    kind: FailureKind,
    phase: str | None,
    *,
    limit_bytes: int,
    num_earlier: int,
    found: Sequence[PostMortem] = (),
) -> Ceiling:
    """Return what predictions must stay below after memory ran out.

    Args:
        memory: what was predicted of the plan that ran out.
        kind: whose memory it was.
        phase: in which it ran out; ``None`` when nobody could say.
        limit_bytes: what a plan may use of a device.
        num_earlier: how many attempts had run out of memory before.
        found: what the ranks wrote down; where they needed more than predicted, everything that
            is predicted now is taken to be as far off.
    """
    fraction = _RUNG_FRACTION ** (2**num_earlier)
    if kind is FailureKind.host_oom:
        return Ceiling(host_bytes=int(fraction * memory.host_bytes_per_node))
    # Before the first phase there is nothing but the model to load.
    known: Phase = "load" if phase == "start" else memory.fullest.phase
    known = next((name for name in get_args(Phase) if name == phase), known)
    return Ceiling(
        phase=known,
        phase_bytes=int(fraction * memory.phase(known).allocated_bytes),
        device_bytes=_device_bytes(memory, known, limit_bytes, found),
    )


def _device_bytes(
    memory: MemoryEstimate, phase: Phase, limit_bytes: int, found: Sequence[PostMortem]
) -> int | None:
    """Return the device memory that a plan may be predicted to use, given what was measured."""
    outside_bytes = memory.device_used_bytes - memory.peak_reserved_bytes
    limits = []
    for one in found:
        if one.allocated_bytes is None or one.reserved_bytes is None:
            continue
        assert one.device_free_bytes is not None
        requested = one.requested_bytes or 0
        excess = max(
            1.0,
            (one.allocated_bytes + requested) / memory.phase(phase).allocated_bytes,
            (one.reserved_bytes + requested) / memory.peak_reserved_bytes,
        )
        # Of what other processes hold nothing can be had.
        own_bytes = one.reserved_bytes + one.device_free_bytes + outside_bytes
        limits.append(min(limit_bytes, own_bytes) / excess)
    return int(min(limits)) if limits else None


def set_by_hand(recipe: Recipe) -> set[str]:
    """Return the strategy fields that the recipe's author has set, and not an earlier recovery."""
    section, chosen = recipe.strategy, set(recipe.recovery.chosen)
    return {name for name in section.given() if name in section.allowed or name not in chosen}


def with_leave(recipe: Recipe) -> Recipe:
    """Return the recipe with leave to change what it fixes, if it gave none."""
    return replace(recipe, recovery=replace(recipe.recovery, oom="ladder"))


def what_may_change(recipe: Recipe) -> list[StrategySection]:
    """Return the strategy fields that stay fixed, fewer from one to the next."""
    chosen: dict[str, Any] = dict.fromkeys(recipe.recovery.chosen)
    own = replace(recipe.strategy, **chosen)
    if recipe.recovery.oom == "within_recipe":
        return [own]
    kept = own.without("micro_batch_size_per_gpu")
    freed = kept.without(*_MEMORY_SAVINGS)
    return [kept] if kept == freed else [kept, freed]


def loadable(section: StrategySection, last: Strategy, run_dir: Path) -> StrategySection:
    """Fix what the newest checkpoint cannot be converted to (launcher/worker/universal.py)."""
    if newest_checkpoint(run_dir) is None:
        return section
    if last.offload_optimizer is Offload.nvme:
        return replace(
            section, zero_stage=last.zero_stage, offload_optimizer=last.offload_optimizer
        )
    places = ("offload_optimizer", "offload_param")
    if any(Offload.nvme in section.choices(key, ()) for key in places):
        return replace(section, offload_optimizer=last.offload_optimizer)
    return replace(section, nvme_path=None)


def with_plan(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe with the plan's choices written down, for whoever resumes the run."""
    names = (*_MEMORY_SAVINGS, "micro_batch_size_per_gpu", "attention", *recipe.strategy.allowed)
    written = {name: getattr(plan.strategy, name) for name in names}
    by_hand = {
        name
        for name in set_by_hand(recipe) - recipe.strategy.allowed.keys()
        if written.get(name) in (None, getattr(recipe.strategy, name))
    }
    return replace(
        recipe,
        model=replace(recipe.model, precision=plan.workload.precision),
        strategy=replace(recipe.strategy, **written),
        recovery=replace(recipe.recovery, chosen=tuple(sorted(written.keys() - by_hand))),
    )
