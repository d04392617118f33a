"""Trace DeepSpeed's real engine over a grid of strategies: benchmarks/oracle_grid.jsonl.

    python benchmarks/make_oracle_grid.py [--only TEXT]

Cases already in the file are kept; delete a line to trace it anew. ZeRO-1 and 2 are traced on
their first and last rank, because the fullest one differs. One process, one case at a time:
about 10 seconds each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.model_spec import spec_from_config
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
    ZeroStage,
)
from launcher.worker.trace import TraceRequest, preload, request_to_json, run_in_child
from launcher.workload import LoraSpec, Workload

OUTPUT = Path(__file__).with_name("oracle_grid.jsonl")

# The published config.json of each model, the keys that fix its shapes.
LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
LLAMA_3_8B: dict[str, Any] = {
    **LLAMA_2_7B,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
CONFIGS = {"llama2-7b": LLAMA_2_7B, "llama3-8b": LLAMA_3_8B}

# Bucket sizes as transformers' "auto" sets them for hidden size 4096
# (transformers 5.23 integrations/deepspeed.py, trainer_config_finalize).
AUTO_KNOBS = ZeroKnobs(
    reduce_bucket_size=4096**2,
    stage3_prefetch_bucket_size=int(0.9 * 4096**2),
    stage3_param_persistence_threshold=40960,
)
METHODS: dict[str, tuple[Method, LoraSpec]] = {
    "full": (Method.full, LoraSpec()),
    "lora64qv": (Method.lora, LoraSpec(r=64, target_modules=("q_proj", "v_proj"))),
    "lora16all": (Method.lora, LoraSpec(r=16)),
    "lora16drop": (Method.lora, LoraSpec(r=16, dropout=0.05)),
}
PLACES: dict[str, tuple[ZeroStage, Offload, Offload]] = {
    "z0": (0, Offload.none, Offload.none),
    "z1": (1, Offload.none, Offload.none),
    "z1o": (1, Offload.cpu, Offload.none),
    "z2": (2, Offload.none, Offload.none),
    "z2o": (2, Offload.cpu, Offload.none),
    "z3": (3, Offload.none, Offload.none),
    "z3o": (3, Offload.cpu, Offload.none),
    "z3op": (3, Offload.cpu, Offload.cpu),
}


def request(
    *,
    model: str = "llama2-7b",
    method: str,
    place: str,
    tokens: int,
    world_size: int,
    has_padding: bool = False,
    precision: Precision = Precision.bf16,
    **choices: Any,
) -> TraceRequest:
    """Return one case; ``choices`` are fields of Strategy."""
    stage, offload_optimizer, offload_param = PLACES[place]
    what, lora = METHODS[method]
    config = CONFIGS[model]
    strategy = Strategy(
        zero_stage=stage,
        offload_optimizer=offload_optimizer,
        offload_param=offload_param,
        **{"attention": Attention.sdpa, **choices},
    )
    workload = Workload(
        model=spec_from_config(config, name=model),
        method=what,
        max_seq_len=tokens,
        global_batch_size=world_size
        * strategy.micro_batch_size_per_gpu
        * strategy.gradient_accumulation_steps,
        precision=precision,
        lora=lora,
        has_padding=has_padding,
    )
    return TraceRequest(
        hf_config=config, workload=workload, strategy=strategy, world_size=world_size
    )


def grid() -> Iterator[tuple[str, TraceRequest]]:
    """Yield named cases: every stage, offload, method and checkpointing; the rest rotates."""
    rotation = itertools.cycle(
        [
            (256, 8, AUTO_KNOBS),
            (2048, 2, ZeroKnobs()),
            (2048, 64, AUTO_KNOBS),
            (256, 1, AUTO_KNOBS),
            (2048, 8, AUTO_KNOBS),
            (256, 2, ZeroKnobs()),
            (256, 64, AUTO_KNOBS),
        ]
    )
    methods = ("full", "lora64qv", "lora16all")
    for place, method, checkpointing in itertools.product(
        PLACES, methods, (Checkpointing.none, Checkpointing.full)
    ):
        tokens, world_size, knobs = next(rotation)
        kind = "auto" if knobs is AUTO_KNOBS else "default"
        name = f"7b-{place}-{method}-gc_{checkpointing}-s{tokens}-n{world_size}-{kind}"
        yield (
            name,
            request(
                method=method,
                place=place,
                tokens=tokens,
                world_size=world_size,
                gradient_checkpointing=checkpointing,
                zero=knobs,
            ),
        )
    yield from _large_vocabulary()
    yield from _single_options()
    yield from _second_copies()
    yield from _reduced_in_fp32()


def _large_vocabulary() -> Iterator[tuple[str, TraceRequest]]:
    """Llama-3-8B: grouped-query attention and 128,256 logits."""
    cases = [
        ("z1", "full", Checkpointing.none, 8),
        ("z1o", "full", Checkpointing.full, 8),
        ("z2", "full", Checkpointing.full, 64),
        ("z2o", "full", Checkpointing.full, 2),
        ("z2", "lora16all", Checkpointing.full, 1),
        ("z2", "lora64qv", Checkpointing.none, 8),
        ("z3", "full", Checkpointing.full, 8),
        ("z3", "lora16all", Checkpointing.none, 8),
        ("z3o", "full", Checkpointing.full, 64),
        ("z3op", "lora16all", Checkpointing.full, 1),
    ]
    for place, method, checkpointing, world_size in cases:
        name = f"8b-{place}-{method}-gc_{checkpointing}-s2048-n{world_size}-auto"
        yield (
            name,
            request(
                model="llama3-8b",
                method=method,
                place=place,
                tokens=2048,
                world_size=world_size,
                gradient_checkpointing=checkpointing,
                zero=AUTO_KNOBS,
            ),
        )


def _single_options() -> Iterator[tuple[str, TraceRequest]]:
    """One option changed at a time, on cases where it moves the peak."""
    full = Checkpointing.full
    z2: dict[str, Any] = {"method": "full", "place": "z2", "tokens": 256, "world_size": 8}
    z3: dict[str, Any] = {"method": "full", "place": "z3", "tokens": 256, "world_size": 8}
    z3o: dict[str, Any] = {**z3, "place": "z3o", "gradient_checkpointing": full}
    overlap = ZeroKnobs(reduce_bucket_size=4096**2, overlap_comm=True)
    yield "7b-z2-eager", request(**z2, attention=Attention.eager, zero=AUTO_KNOBS)
    yield (
        "7b-z2-eager-s2048-gc_full",
        request(
            **{**z2, "tokens": 2048, "world_size": 64},
            attention=Attention.eager,
            gradient_checkpointing=full,
            zero=AUTO_KNOBS,
        ),
    )
    yield "7b-z2-overlap", request(**z2, zero=overlap)
    yield "7b-z1-overlap", request(**{**z2, "place": "z1"}, zero=overlap)
    yield "7b-z2-accum_fp32", request(**z2, grad_accum_dtype=Precision.fp32, zero=AUTO_KNOBS)
    yield (
        "7b-z1-accum_fp32",
        request(**{**z2, "place": "z1"}, grad_accum_dtype=Precision.fp32, zero=AUTO_KNOBS),
    )
    yield "7b-z3-accum_fp32", request(**z3, grad_accum_dtype=Precision.fp32, zero=AUTO_KNOBS)
    yield "7b-z2-foreach", request(**z2, optimizer=Optimizer.adamw_foreach, zero=AUTO_KNOBS)
    yield "7b-z2-single", request(**z2, optimizer=Optimizer.adamw_single, zero=AUTO_KNOBS)
    yield "7b-z2-steps4", request(**z2, gradient_accumulation_steps=4, zero=AUTO_KNOBS)
    yield (
        "7b-z2-micro4-gc_full",
        request(
            **{**z2, "tokens": 2048, "world_size": 64},
            gradient_checkpointing=full,
            micro_batch_size_per_gpu=4,
            zero=AUTO_KNOBS,
        ),
    )
    offloaded = {**z2, "tokens": 2048, "gradient_checkpointing": Checkpointing.cpu_offload}
    yield "7b-z2-gc_cpu_offload", request(**{**offloaded, "world_size": 64}, zero=AUTO_KNOBS)
    yield (
        "8b-z2-chunked",
        request(
            **{**z2, "model": "llama3-8b", "method": "lora16all", "tokens": 2048},
            gradient_checkpointing=full,
            loss=Loss.chunked,
            zero=AUTO_KNOBS,
        ),
    )
    yield "7b-z2-fp32", request(**z2, precision=Precision.fp32, zero=AUTO_KNOBS)
    yield "7b-z3-sub_group", request(**z3, zero=ZeroKnobs(sub_group_size=100_000_000))
    yield "7b-z3o-live0", request(**z3o, zero=ZeroKnobs(stage3_max_live_parameters=0))
    yield "7b-z3o-live3e8", request(**z3o, zero=ZeroKnobs(stage3_max_live_parameters=300_000_000))
    lora: dict[str, Any] = {"method": "lora16drop", "tokens": 2048, "world_size": 8}
    yield "7b-z2-lora-dropout", request(**lora, place="z2", zero=AUTO_KNOBS)
    yield "7b-z3-lora-dropout", request(**lora, place="z3", zero=AUTO_KNOBS)
    yield "7b-z2-lora-padding", request(**lora, place="z2", has_padding=True, zero=AUTO_KNOBS)


def _second_copies() -> Iterator[tuple[str, TraceRequest]]:
    """hpZ: on 64 ranks, a second copy of the parameters in each group of 8.

    Not full fine-tuning with offloaded parameters: copies that a backward hook makes are taken
    for device memory there, as torch's function modes do not see what the hook does.
    """
    auto = replace(AUTO_KNOBS, zero_hpz_partition_size=8)
    case: dict[str, Any] = {"method": "full", "place": "z3", "tokens": 256, "world_size": 64}
    full = Checkpointing.full
    yield "7b-z3-hpz8", request(**case, zero=auto)
    yield (
        "7b-z3-hpz8-gc_full",
        request(**{**case, "tokens": 2048}, gradient_checkpointing=full, zero=auto),
    )
    yield (
        "7b-z3-hpz8-steps2",
        request(**case, gradient_checkpointing=full, gradient_accumulation_steps=2, zero=auto),
    )
    yield (
        "7b-z3o-hpz8",
        request(**{**case, "place": "z3o"}, gradient_checkpointing=full, zero=auto),
    )
    lora = {**case, "method": "lora16all"}
    yield "7b-z3-hpz8-lora", request(**lora, gradient_checkpointing=full, zero=auto)
    yield (
        "7b-z3op-hpz8-lora",
        request(**{**lora, "place": "z3op"}, gradient_checkpointing=full, zero=auto),
    )
    yield (
        "7b-z3-hpz4-n8-default",
        request(
            **{**case, "world_size": 8},
            gradient_checkpointing=full,
            zero=ZeroKnobs(zero_hpz_partition_size=4),
        ),
    )


def _reduced_in_fp32() -> Iterator[tuple[str, TraceRequest]]:
    """bf16 gradients that are reduced in fp32 (``communication_data_type``)."""
    knobs = ZeroKnobs(communication_data_type="fp32")
    for place in ("z0", "z1", "z2", "z2o", "z3", "z3o"):
        yield (
            f"7b-{place}-reduced_fp32",
            request(
                method="full",
                place=place,
                tokens=256,
                world_size=8,
                gradient_checkpointing=Checkpointing.full,
                zero=knobs,
            ),
        )


def ranks_of(case: TraceRequest) -> tuple[int, ...]:
    """Return the ranks to trace: the first and last one where their bytes differ."""
    differs = case.strategy.zero_stage in (1, 2) and case.world_size > 1
    return (0, case.world_size - 1) if differs else (0,)


def main() -> None:
    """Trace what the file lacks and append it, a line a case and rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="trace the cases whose name contains this")
    wanted = parser.parse_args().only
    lines = OUTPUT.read_text(encoding="utf-8").splitlines() if OUTPUT.exists() else []
    done = {(record["name"], record["request"]["rank"]) for record in map(json.loads, lines)}
    preload()
    for name, case in grid():
        value = request_to_json(case)
        for rank in ranks_of(case):
            if wanted not in name or (name, rank) in done:
                continue
            started = time.monotonic()
            value = {**value, "rank": rank}
            result = run_in_child(value)
            seconds = time.monotonic() - started
            sys.stderr.write(f"{seconds:5.1f} s  {name} rank {rank}: ")
            sys.stderr.write(f"{result.get('error') or result['peak_bytes'] / 1e9}\n")
            if "error" not in result:
                with OUTPUT.open("a", encoding="utf-8") as stream:
                    stream.write(
                        json.dumps({"name": name, "request": value, "result": result}) + "\n"
                    )


if __name__ == "__main__":
    main()
