"""What must hold of predicted bytes whatever is trained and however."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planning_inputs import cluster, model, workload

from launcher.planning.rules import why_impossible
from launcher.predict.components import INPUTS
from launcher.predict.memory import estimate_memory
from launcher.strategy import (
    LOSS_CHUNK_ELEMENTS,
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Strategy,
    ZeroKnobs,
)

MODELS = ("llama2-7b", "smollm2-135m", "gemma3-1b", "mixtral-8x7b", "falcon-7b")
SMALL = ZeroKnobs(reduce_bucket_size=4096**2, stage3_prefetch_bucket_size=4096**2)
STRATEGIES = st.builds(
    Strategy,
    zero_stage=st.sampled_from([0, 1, 2, 3]),
    offload_optimizer=st.sampled_from([Offload.none, Offload.cpu]),
    gradient_checkpointing=st.sampled_from(Checkpointing),
    attention=st.sampled_from(Attention),
    loss=st.sampled_from(Loss),
    micro_batch_size_per_gpu=st.sampled_from([1, 3]),
    gradient_accumulation_steps=st.sampled_from([1, 4]),
    zero=st.sampled_from([ZeroKnobs(), SMALL]),
)


def chunk_elements(tokens: int, vocab_size: int) -> int:
    """Logits of one chunk of the loss, as ``launcher/worker/loss.py`` cuts them."""
    chunks = max(1, math.ceil(tokens * vocab_size / LOSS_CHUNK_ELEMENTS))
    return math.ceil(tokens / chunks) * vocab_size


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(MODELS),
    method=st.sampled_from(Method),
    strategy=STRATEGIES,
    lengths=st.tuples(st.integers(64, 8192), st.integers(1, 4096)),
    gpus=st.sampled_from([1, 8]),
)
def test_more_tokens_need_no_less_memory_but_for_the_smaller_chunks_of_a_chunked_loss(
    name: str, method: Method, strategy: Strategy, lengths: tuple[int, int], gpus: int
) -> None:
    """One chunk more makes all chunks smaller: up to 16 bytes a logit, with a capped score."""
    (tokens, more), place = lengths, cluster(gpus=gpus)
    work = workload(name, place=place, method=method, tokens=tokens)
    if why_impossible(strategy, work, place):
        return
    longer = replace(work, max_seq_len=tokens + more)
    before, after = (
        estimate_memory(item, strategy, place).peak_allocated_bytes for item in (work, longer)
    )
    allowed = 0
    if strategy.loss is Loss.chunked:
        batch, vocab = strategy.micro_batch_size_per_gpu, model(name).vocab_size
        sizes = [chunk_elements(batch * length, vocab) for length in (tokens, tokens + more)]
        allowed = 16 * max(0, sizes[0] - sizes[1])
    assert after >= before - allowed


def test_no_mask_is_left_when_the_step_runs() -> None:
    # H100, 7B LoRA, eager attention, 1,024 to 2,816 tokens: the step's peak is 7.813 GB in all.
    for tokens in (1024, 2816):
        work = workload("llama2-7b", method=Method.lora, tokens=tokens)
        strategy = Strategy(zero_stage=2, attention=Attention.eager)
        memory = estimate_memory(work, strategy, cluster())
        assert memory.phase("step").components[INPUTS] == 24 * tokens
        assert memory.phase("backward").components[INPUTS] > 2 * tokens**2


def test_zero_1_keeps_its_bucket_from_one_micro_step_to_the_next() -> None:
    # H100, SmolLM2-1.7B, three micro-steps: 0.100 GB of bucket in forward, besides the gradients.
    work = workload("smollm2-1.7b", method=Method.full, tokens=576)
    strategy = Strategy(zero_stage=1, zero=ZeroKnobs(reduce_bucket_size=50_000_896))
    forward = [
        estimate_memory(
            work, replace(strategy, gradient_accumulation_steps=steps), cluster(gpus=1)
        ).phase("forward")
        for steps in (1, 3)
    ]
    waiting = forward[1].allocated_bytes - forward[0].allocated_bytes
    assert waiting == 2 * work.model.num_params + 2 * 50_000_896
