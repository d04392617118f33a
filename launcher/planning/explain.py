"""Say why: each choice against its best alternative, in sentences for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launcher.hardware import ClusterSpec
from launcher.planning.plan import Candidate, Decision
from launcher.planning.rules import losses_that_work
from launcher.planning.search import SearchSpace, kind, weigh_all
from launcher.planning.wording import (
    LOSS_MEANING,
    SAME_TIME_FRACTION,
    compare,
    format_samples,
    short_label,
    short_size,
)
from launcher.predict.attention_kernel import attention_kernel, can_run_flash
from launcher.strategy import (
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Optimizer,
    Precision,
    Strategy,
    ZeroKnobs,
)
from launcher.units import format_count
from launcher.workload import Workload

_HOST = {Offload.cpu: "in host memory", Offload.nvme: "on the NVMe drive"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A choice and what it was made from."""

    space: SearchSpace
    best: Candidate
    weighed: Sequence[Candidate]

    def what_if(self, strategy: Strategy) -> Candidate:
        """Return a strategy of the same micro-batch, weighed."""
        return self.space.weigh(strategy, strategy.micro_batch_size_per_gpu)


def explain_choice(setting: Setting) -> tuple[Decision, ...]:
    """Return one decision per setting, each compared with its alternatives."""
    strategy, fixed = setting.best.strategy, setting.space.fixed
    workload = setting.space.workload
    found = [
        ("precision", workload.precision.value, _precision(workload, setting.space.cluster)),
        ("zero_stage", str(strategy.zero_stage), _stage(setting)),
        ("offload_optimizer", strategy.offload_optimizer.value, _offload_optimizer(setting)),
    ]
    if strategy.optimizer is not Optimizer.adamw or "optimizer" in fixed.given():
        found.append(("optimizer", strategy.optimizer.value, _optimizer(setting)))
    if strategy.sequence_parallel_size > 1 or fixed.sequence_parallel_size is not None:
        value = str(strategy.sequence_parallel_size)
        found.append(("sequence_parallel_size", value, _sequences(setting)))
    if strategy.zero_stage == 3 or fixed.offload_param is not None:
        value = strategy.offload_param.value
        found.append(("offload_param", value, _offload_param(setting)))
    found += [
        ("gradient_checkpointing", strategy.gradient_checkpointing.value, _checkpointing(setting)),
        ("attention", strategy.attention.value, _attention(setting)),
        ("loss", strategy.loss.value, _loss(setting)),
        (
            "micro_batch_size_per_gpu",
            str(strategy.micro_batch_size_per_gpu),
            _micro_batch(setting),
        ),
        ("reduce_bucket_size", f"{strategy.zero.reduce_bucket_size:,}", _buckets(setting)),
    ]
    return tuple(
        Decision(field=field, value=value, reason=_sentence(reason, fixed.given().get(field)))
        for field, value, reason in found
    )


def _sentence(reason: str, given: object) -> str:
    """Return the reason as sentences; of what the recipe says, what it means and who decided."""
    meaning, _, rest = reason.partition(". ")
    if isinstance(given, tuple):
        values = ", ".join(str(getattr(value, "value", value)) for value in given)
        rest = f"{rest} The recipe allows {values}.".lstrip()
    elif given is not None:
        rest = "Set in the recipe."
    text = f"{meaning.removesuffix('.')}. {rest}".strip()
    text = text if text.endswith(".") else f"{text}."
    return text[0].upper() + text[1:]


def _precision(workload: Workload, cluster: ClusterSpec) -> str:
    gpu, precision = cluster.gpu, workload.precision
    if gpu.device_type == "cpu":
        return f"the ranks run on the processor, which trains in {precision.value}"
    if precision is Precision.fp32:
        return "4 bytes per number: exact, slow, twice the memory"
    if precision is Precision.bf16:
        return f"2 bytes per number; {gpu.name} computes in bf16, which needs no loss scaling"
    if gpu.has_bf16:
        return "2 bytes per number, with loss scaling against underflow"
    return (
        f"2 bytes per number; {gpu.name} cannot compute in bf16, so fp16, with loss scaling "
        "against underflow"
    )


def _stage(setting: Setting) -> str:
    strategy, workload = setting.best.strategy, setting.space.workload
    ranks = setting.space.cluster.world_size
    if ranks == 1:
        meaning = "one GPU has nobody to share its states with, whatever the stage"
        if strategy.offload_param is not Offload.none:
            return "the stage that can keep the weights in host memory"
        rivals = _rivals(setting, lambda s: s.zero_stage, lambda v: f"ZeRO-{v}")
        # Among equals ZeRO-2 is taken, so that there is nothing to say of the others.
        return meaning if strategy.zero_stage == 2 else f"{meaning}. {rivals}"
    share = f"each of the {ranks:,} GPUs keeps 1/{ranks:,} of"
    shared = {
        0: "every GPU keeps everything",
        1: f"{share} the optimizer states",
        2: f"{share} the optimizer states and gradients",
        3: f"{share} optimizer states, gradients and weights; weights are fetched from the others "
        "layer by layer",
    }[strategy.zero_stage]
    if workload.method is not Method.full and strategy.zero_stage < 3:
        frozen = setting.best.memory.phase("step").components
        whole = sum(size for name, size in frozen.items() if "parameters" in name)
        shared += f"; the frozen model ({short_size(whole)}) stays whole on each"
    return f"{shared}. {_rivals(setting, lambda s: s.zero_stage, lambda v: f'ZeRO-{v}')}"


def _offload_optimizer(setting: Setting) -> str:
    strategy = setting.best.strategy
    if strategy.offload_optimizer is Offload.none:
        meaning = "the optimizer states stay on the GPU"
    else:
        meaning = f"the optimizer states live {_HOST[strategy.offload_optimizer]}"
        meaning += ", and the processor updates the weights"
    rivals = _rivals(setting, lambda s: s.offload_optimizer, _place)
    return f"{meaning}. {rivals} {_rounded_states(setting)}".rstrip()


def _rounded_states(setting: Setting) -> str:
    """Say that 8-bit states, which no plan takes unasked, would be faster on the GPU."""
    space, strategy = setting.space, setting.best.strategy
    moved = {key: getattr(strategy, key) for key in ("offload_optimizer", "offload_param")}
    is_open = all(space.fixed.permits(key, Offload.none) for key in moved)
    if set(moved.values()) == {Offload.none} or not is_open or "optimizer" in space.fixed.given():
        return ""
    there = replace(
        space.fixed,
        optimizer=Optimizer.adamw_8bit,
        offload_optimizer=Offload.none,
        offload_param=Offload.none,
        sequence_parallel_size=strategy.sequence_parallel_size,
    )
    weighed, _ = weigh_all(replace(space, fixed=there), every_kind=False)
    seconds = min((item.time.step_seconds for item in weighed if item.fits), default=float("inf"))
    gain = 1 - seconds / setting.best.time.step_seconds
    if gain <= SAME_TIME_FRACTION:
        return ""
    return (
        f"8-bit states (strategy.optimizer=adamw_8bit) would fit there and be {gain:.0%} faster; "
        "the training is then not quite the same."
    )


def _optimizer(setting: Setting) -> str:
    optimizer = setting.best.strategy.optimizer
    rounded = "Adam's two averages of each trained parameter are rounded to one byte in place of 4"
    meaning = {
        Optimizer.adamw: "Adam keeps two averages of each trained parameter, of 4 bytes each",
        Optimizer.adamw_foreach: "torch's AdamW, all tensors at once: fast, with large temporaries",
        Optimizer.adamw_single: "torch's AdamW, one tensor after the other",
        Optimizer.adamw_8bit: f"{rounded}: the training is not quite the same",
        Optimizer.paged_adamw_8bit: f"{rounded}, and move to host memory when the GPU is full",
    }[optimizer]
    return f"{meaning}. {_rivals(setting, lambda s: s.optimizer, lambda v: f'choosing {v}')}"


def _offload_param(setting: Setting) -> str:
    strategy = setting.best.strategy
    if strategy.offload_param is Offload.none:
        meaning = "the weights stay on the GPUs"
    else:
        meaning = f"the weights live {_HOST[strategy.offload_param]} and visit the GPU for use"
    return f"{meaning}. {_rivals(setting, lambda s: s.offload_param, _place)}"


def _sequences(setting: Setting) -> str:
    size = setting.best.strategy.sequence_parallel_size
    meaning = "each GPU has whole sequences"
    if size > 1:
        meaning = (
            f"{size} GPUs share each sequence: 1/{size} of its tokens each, in attention 1/{size} "
            "of the heads"
        )

    def name(value: object) -> str:
        return "keeping sequences whole" if value == 1 else f"sharing each by {value}"

    return f"{meaning}. {_rivals(setting, lambda s: s.sequence_parallel_size, name)}"


def _place(value: object) -> str:
    if value is Offload.none:
        return "keeping them on the GPU"
    return "moving them to the host" if value is Offload.cpu else "moving them to NVMe"


def _checkpointing(setting: Setting) -> str:
    meaning = {
        Checkpointing.none: "what forward computed is kept for backward; nothing is computed twice",
        Checkpointing.full: "only each layer's input is kept for backward, and the layer is "
        "computed once more there",
        Checkpointing.cpu_offload: "each layer's input waits in host memory for backward, and the "
        "layer is computed once more there",
    }[setting.best.strategy.gradient_checkpointing]
    names = {
        Checkpointing.none: "keeping everything",
        Checkpointing.full: "computing layers twice",
        Checkpointing.cpu_offload: "parking layer inputs in host memory",
    }

    def name(value: object) -> str:
        assert isinstance(value, Checkpointing)
        return names[value]

    return f"{meaning}. {_rivals(setting, lambda s: s.gradient_checkpointing, name)}"


def _attention(setting: Setting) -> str:
    strategy, space = setting.best.strategy, setting.space
    gpu, workload = space.cluster.gpu, space.workload
    kernel = attention_kernel(workload, strategy, gpu)
    stored = "every token's score for every other is stored"
    if workload.model.attention_softcap:
        return f"{stored}: this model caps its scores, which no fused kernel does"
    if kernel in ("eager", "math"):
        sdpa = replace(strategy, attention=Attention.sdpa)
        if attention_kernel(workload, sdpa, gpu) == "math":
            return f"{stored}: on {gpu.name} torch has no fused kernel for this model's heads"
        return stored
    name = {"flash": "FlashAttention-2", "efficient": "torch's memory-efficient kernel"}.get(
        kernel, "torch's memory-efficient kernel with a mask"
    )
    if gpu.device_type == "cpu":
        name = "torch's fused kernel for processors"
    elif not gpu.has_flash_attention_2:
        name += f" ({gpu.name} has no FlashAttention-2)"
    eager = setting.what_if(replace(strategy, attention=Attention.eager))
    verdict = _verdict("Storing them (eager)", eager, setting)
    if strategy.attention is Attention.flash_attention_2:
        own = setting.what_if(replace(strategy, attention=Attention.sdpa))
        verdict += " " + _verdict("Torch's own choice (sdpa)", own, setting)
    elif kernel != "flash" and can_run_flash(workload, gpu):
        flash = setting.what_if(replace(strategy, attention=Attention.flash_attention_2))
        package = "The flash-attn package (strategy.attention=flash_attention_2)"
        verdict += f" {_verdict(package, flash, setting)}"
    return f"{name}; scores between tokens are never stored. {verdict}"


def _loss(setting: Setting) -> str:
    strategy, space = setting.best.strategy, setting.space
    meaning = LOSS_MEANING[strategy.loss]
    works = losses_that_work(
        space.workload.model, space.cluster.gpu, has_liger=space.packages.has_liger
    )
    sentences = []
    for loss in space.fixed.choices("loss", works):
        if loss is strategy.loss:
            continue
        has_kernels = loss is Loss.liger
        if space.fixed.liger_kernels is not None:
            has_kernels = space.fixed.liger_kernels
        other = setting.what_if(replace(strategy, loss=loss, liger_kernels=has_kernels))
        name = {Loss.full: "All at once", Loss.chunked: "A few at a time"}.get(loss, "Liger")
        sentences.append(_verdict(name, other, setting))
    return f"{meaning}. {' '.join(sentences)}"


def _micro_batch(setting: Setting) -> str:
    strategy, space = setting.best.strategy, setting.space
    size, rounds = strategy.micro_batch_size_per_gpu, strategy.gradient_accumulation_steps
    ranks, total = space.cluster.world_size, space.workload.global_batch_size
    gpus, who = "1 GPU" if ranks == 1 else f"{ranks:,} GPUs", "GPU"
    if (shared_by := strategy.sequence_parallel_size) > 1:
        num_groups = ranks // shared_by
        who = f"group of {shared_by} GPUs"
        gpus = "1 group" if num_groups == 1 else f"{num_groups:,} groups"
    meaning = f"each {who} works on {format_samples(size)} at a time"
    if rounds > 1:
        meaning += f", {rounds} times before the weights change"
        meaning += f" ({size} x {rounds} x {gpus} = {format_samples(total)} per step)"
    else:
        meaning += f" ({size} x {gpus} = {format_samples(total)} per step)"
    larger = next((other for other in space.micro_batch_sizes if other > size), None)
    if larger is None:
        return meaning
    rival = space.weigh(strategy, larger)
    return f"{meaning}. {_verdict(f'{larger} at a time', rival, setting)}"


def _buckets(setting: Setting) -> str:
    strategy, ranks = setting.best.strategy, setting.space.cluster.world_size
    bucket, default = strategy.zero.reduce_bucket_size, ZeroKnobs().reduce_bucket_size
    meaning = f"gradients travel in packets of {format_count(bucket)}"
    if ranks == 1:
        meaning = f"gradients pass through a buffer of {format_count(bucket)} numbers"
    raw = setting.space.raw_deepspeed.get("zero_optimization", {})
    if "reduce_bucket_size" in raw:
        return f"{meaning}. Set in the recipe"
    if bucket == setting.space.workload.num_trainable_params or bucket < default:
        usual = setting.what_if(
            replace(strategy, zero=replace(strategy.zero, reduce_bucket_size=default))
        )
        more = usual.memory.device_used_bytes - setting.best.memory.device_used_bytes
        if more > 0:
            return (
                f"{meaning}. DeepSpeed's usual {format_count(default)} would take "
                f"{short_size(more)} more for no gain in speed"
            )
    return meaning


def _rivals(
    setting: Setting, value_of: Callable[[Strategy], object], name_of: Callable[[object], str]
) -> str:
    """Compare the choice with the best candidate for each other value of one field."""
    best = setting.best
    chosen = value_of(best.strategy)
    rivals: dict[object, Candidate] = {}
    for candidate in setting.weighed:
        value = value_of(candidate.strategy)
        if value == chosen:
            continue
        if value not in rivals or _nearness(candidate, best) < _nearness(rivals[value], best):
            rivals[value] = candidate
    told: dict[str, list[str]] = {}
    for value, rival in sorted(rivals.items(), key=lambda item: _nearness(item[1], best)):
        name = name_of(value)
        reason = _reason(rival, setting).replace(f"({name}, ", "(")
        told.setdefault(reason, []).append(name)
    return " ".join(
        f"{_capitalized(' or '.join(names))} {reason}." for reason, names in list(told.items())[:2]
    )


def _nearness(candidate: Candidate, best: Candidate) -> tuple[int, bool, float]:
    """Sort by how many other things differ, then what fits by time, the rest by its memory."""
    pairs = zip(kind(candidate.strategy), kind(best.strategy), strict=True)
    differences = sum(a != b for a, b in pairs)
    seconds, size = candidate.time.step_seconds, candidate.memory.device_used_bytes
    return (differences, not candidate.fits, seconds if candidate.fits else float(size))


def _reason(rival: Candidate, setting: Setting) -> str:
    strategy, chosen = rival.strategy, setting.best.strategy
    pairs = zip(kind(strategy), kind(chosen), strict=True)
    words = [short_label(strategy)] if sum(a != b for a, b in pairs) > 1 else []
    if words and strategy.optimizer is not chosen.optimizer:
        words.append(strategy.optimizer.value)
    size = strategy.micro_batch_size_per_gpu
    if rival.fits and size != chosen.micro_batch_size_per_gpu:
        words.append(f"micro-batch {size}")
    prefix = f"({', '.join(words)}) " if words else ""
    return prefix + _outcome(rival, setting)


def _verdict(name: str, rival: Candidate, setting: Setting) -> str:
    return f"{name} {_outcome(rival, setting)}."


def _outcome(rival: Candidate, setting: Setting) -> str:
    space = setting.space
    host_bytes = rival.memory.host_bytes_per_node
    more_host = f"{short_size(host_bytes)} of host memory per node"
    if rival.fits:
        return compare(rival, setting.best)
    if not setting.best.fits:
        words = compare(rival, setting.best)
        room = max(space.cluster.host_memory_bytes, setting.best.memory.host_bytes_per_node)
        return f"{words}, with {more_host}" if host_bytes > room else words
    if rival.memory.device_used_bytes > space.limit_bytes:
        return f"needs {short_size(rival.memory.device_used_bytes)} per GPU and does not fit"
    return f"needs {more_host}, more than there is"


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]
