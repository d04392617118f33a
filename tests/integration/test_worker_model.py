"""What a rank makes of model, kernels and optimizer, and what it refuses in plain words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from safetensors.torch import load_file
from worker_runs import Nursery, make_model, make_tokenizer, small_buckets, write_run

from launcher.errors import ModelError, SetupError
from launcher.model_source import resolve_model
from launcher.recipe import parse_recipe
from launcher.strategy import Attention, Offload, Optimizer, Precision, Strategy
from launcher.worker.attention import _copy_grouped_heads, settle_attention
from launcher.worker.mapped_weights import map_safetensors
from launcher.worker.model import _read_config, load_model, optimizer_class
from launcher.worker.prerequisites import check_nvme
from launcher.worker.unreadable import unreadable

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


def load(folder: Path, tmp_path: Path, *, more: str = "") -> Any:
    text = f"model: {{name_or_path: {folder}, precision: fp32{more}}}\nmethod: full\n"
    recipe = parse_recipe(text, source="test")
    return load_model(
        recipe, Strategy(zero_stage=2), precision=Precision.fp32, device=CPU, run_dir=tmp_path
    )


# --- optimizers --------------------------------------------------------------------------

# One step on the weight 1 with the gradient 1, learning rate 0.1, weight decay 0.5. Adam's first
# step is the learning rate in the gradient's direction (arXiv:1412.6980, algorithm 1: both
# moments are corrected to 1). Decoupled decay takes 0.1 * 0.5 * 1 besides (arXiv:1711.05101,
# algorithm 2): 1 - 0.05 - 0.1 = 0.85. Decay inside the gradient would leave 1 - 0.1 = 0.9.
DECOUPLED = 0.85


def one_step(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> float:
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.min().item() == pytest.approx(weight.max().item())
    return weight[0].item()


@pytest.mark.parametrize(
    "name",
    [Optimizer.adamw, Optimizer.adamw_foreach, Optimizer.adamw_single, Optimizer.adamw_8bit],
)
def test_weight_decay_is_decoupled(name: Optimizer) -> None:
    weight = torch.nn.Parameter(torch.ones(8192))  # bitsandbytes keeps small tensors in fp32
    chosen, variant = optimizer_class(Strategy(zero_stage=2, optimizer=name))
    optimizer = chosen([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, **variant)
    assert one_step(optimizer, weight) == pytest.approx(DECOUPLED, abs=1e-3)


@pytest.mark.parametrize("name", [Optimizer.adamw, Optimizer.adamw_8bit])
def test_weight_decay_stays_decoupled_when_the_states_are_offloaded(name: Optimizer) -> None:
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    weight = torch.nn.Parameter(torch.ones(8192))
    strategy = Strategy(zero_stage=2, optimizer=name, offload_optimizer=Offload.cpu)
    chosen, variant = optimizer_class(strategy)
    planned = chosen([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, **variant)
    offloaded = map_pytorch_optim_to_deepspeed(planned)
    assert type(offloaded).__name__ == "DeepSpeedCPUAdam"
    assert offloaded.param_groups[0]["betas"] == (0.9, 0.99)
    assert one_step(offloaded, weight) == pytest.approx(DECOUPLED, abs=1e-3)


# --- attention ---------------------------------------------------------------------------


def test_the_kernel_on_a_processor_is_said_and_nothing_is_barred(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    line = settle_attention(model, Attention.sdpa, dtype=torch.float32, device=CPU)
    assert line == "torch's fused kernel for processors (SDPA)"
    assert torch.backends.cuda.math_sdp_enabled()
    eager = settle_attention(model, Attention.eager, dtype=torch.float32, device=CPU)
    assert "as planned" in eager


def test_the_flash_attn_package_is_what_transformers_is_told_to_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "flash_attn-2.8.3.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = parse_recipe(f"model: {{name_or_path: {folder}}}", source="test")
    planned = Strategy(zero_stage=2, attention=Attention.flash_attention_2)
    config = _read_config(recipe, planned, tmp_path)
    assert config._attn_implementation == "flash_attention_2"
    line = settle_attention(None, planned.attention, dtype=torch.bfloat16, device=CPU)
    assert line == "the flash-attn package, 2.8.3"


def test_copied_grouped_heads_attend_as_groups_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.integrations import sdpa_attention

    asked: list[bool] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def listen(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(options.get("enable_gqa", False))
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", listen)
    # The fixture of this name is put back afterwards.
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    tokens = torch.arange(12).reshape(1, 12)
    grouped = model(input_ids=tokens).logits
    _copy_grouped_heads()
    copied = model(input_ids=tokens).logits
    # Two layers each; the model has 4 query heads and 2 key/value heads.
    assert asked == [True, True, False, False]
    torch.testing.assert_close(copied, grouped)


# --- weights -----------------------------------------------------------------------------


def test_mapped_weights_are_the_file_s(folder: Path) -> None:
    path = folder / "model.safetensors"
    read, mapped = load_file(path), map_safetensors(path)
    assert set(mapped) == set(read)
    for name, value in read.items():
        assert torch.equal(mapped[name], value)


def test_a_damaged_file_is_not_mapped(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "model.safetensors"
    short.write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(SafetensorError):
        map_safetensors(short)


# By hand, of a model of 256 with an MLP of 1,024: q, o 2 x 256 x 256, k, v 2 x 64 x 256, MLP
# 3 x 256 x 1,024; norms 512; embedding and head 2 x 300 x 256; the last norm 256.
MATRICES, NORMS, REST = 2 * 256**2 + 2 * 64 * 256 + 3 * 256 * 1024, 512, 2 * 300 * 256 + 256
LARGEST_BYTES = 4 * 256 * 1024
# fp32 throughout; or 4 bits, and for each block of 64 one byte that is not partitioned.
FP32_BYTES = 4 * (6 * (MATRICES + NORMS) + REST)
NF4_BYTES = 16 * MATRICES // 2 + 4 * (16 * NORMS + REST)
NF4_SCALE_BYTES = 16 * MATRICES // 64


@pytest.mark.parametrize(
    ("method", "num_layers", "bounds"),
    [
        # The matrix that is dealt out, and its copy.
        ("lora", 6, (FP32_BYTES // 2, 2 * LARGEST_BYTES)),
        # The matrix that is being quantized, in fp32, and what becomes of it.
        ("qlora", 16, (NF4_BYTES // 2, NF4_SCALE_BYTES + LARGEST_BYTES * 3 // 2)),
    ],
)
def test_no_rank_holds_the_whole_model_while_zero_3_loads_it(
    nursery: Nursery, tmp_path: Path, method: str, num_layers: int, bounds: tuple[int, int]
) -> None:
    model = make_model(
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
    )
    text = f"""
model: {{name_or_path: {model}, precision: fp32}}
method: {method}
max_seq_len: 32
data: {{path: {tmp_path / "train.jsonl"}}}
lora: {{r: 2}}
optim: {{global_batch_size: 2, max_steps: 1, lr_scheduler_type: polynomial, warmup_ratio: 0}}
"""
    (tmp_path / "train.jsonl").write_text('{"text": "one two three four"}\n' * 4)
    run = write_run(
        tmp_path / "run", text, small_buckets(zero_stage=3, offload_optimizer=Offload.none),
        world_size=2,
    )  # fmt: skip
    nursery.tokenize(run)
    outcome = nursery.train(run)
    assert outcome.returncode == 0, outcome.stderr
    half_bytes, moment_bytes = bounds
    for peaks in outcome.peaks:
        found = peaks.phases["load"].peak_allocated_bytes
        assert half_bytes < found < half_bytes + moment_bytes + 2**18


# --- configuration -----------------------------------------------------------------------


def test_a_raised_limit_of_positions_reaches_the_model(folder: Path, tmp_path: Path) -> None:
    assert load(folder, tmp_path).config.max_position_embeddings == 512
    raised = load(folder, tmp_path, more=", max_position_embeddings: 2048")
    assert raised.config.max_position_embeddings == 2048
    assert raised(input_ids=torch.zeros(1, 700, dtype=torch.int64)).logits.shape == (1, 700, 300)


def test_packed_weights_are_refused_by_methods_that_would_not_know_them(
    folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"stored in 4 or 8 bits(.|\n)*method qlora"):
        load(tmp_path / "packed", tmp_path)


@pytest.fixture
def folder_with_code(folder: Path, tmp_path: Path) -> Path:
    """A model whose folder brings code, which leaves a file when it is run."""
    target = tmp_path / "own-code"
    make_tokenizer(target)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.CustomConfig"}}
    (target / "config.json").write_text(json.dumps(config))
    (target / "code.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\n")
    return target


def test_a_model_s_own_code_is_not_run_unless_asked_for(
    folder_with_code: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        load(folder_with_code, tmp_path)
    # A look-up reads config.json alone, also where the recipe trusts the code.
    with pytest.raises(ModelError):
        resolve_model(str(folder_with_code))
    assert not (tmp_path / "was-run").exists()


def test_a_gated_model_says_how_to_log_in() -> None:
    gated = GatedRepoError.__new__(GatedRepoError)  # its constructor wants a hub's response
    error = OSError("You are trying to access a gated repo.\nMake sure to have access to it.")
    error.__cause__ = gated
    found = unreadable("meta-llama/Llama-2-7b-hf", error)
    assert "You are trying to access a gated repo." in found.problem
    assert "hf auth login" in found.fix
    assert "HF_TOKEN" in found.fix
    assert "accept the licence" in found.fix


# --- NVMe --------------------------------------------------------------------------------

NVME = Strategy(zero_stage=3, offload_optimizer=Offload.nvme)


def test_offload_to_nvme_without_libaio_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_arguments, **_options: False)
    with pytest.raises(SetupError) as caught:
        check_nvme(str(tmp_path), NVME)
    assert "libaio-dev" in caught.value.fix
    check_nvme(None, Strategy(zero_stage=3))  # nothing goes there


def test_a_drive_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_arguments, **_options: True)
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"strategy\.nvme_path"):
        check_nvme(str(tmp_path / "file"), NVME)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_states_on_nvme_train_to_the_same_losses(
    nursery: Nursery, tmp_path: Path, method: str
) -> None:
    # DeepSpeed swaps only what has 1 MiB and more (swap_tensor/constants.py, MIN_AIO_BYTES), so
    # the model is larger than the grid's. Its async_io operator takes 6 minutes to compile once.
    model = make_model(
        tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=3
    )
    (tmp_path / "train.jsonl").write_text('{"text": "one two three four"}\n' * 16)
    drive = tmp_path / "drive"
    losses = {}
    for place in (Offload.cpu, Offload.nvme):
        text = f"""
model: {{name_or_path: {model}, precision: fp32}}
method: {method}
max_seq_len: 32
data: {{path: {tmp_path / "train.jsonl"}}}
optim: {{global_batch_size: 4, max_steps: 4, learning_rate: 0.001}}
strategy: {{nvme_path: {drive}}}
lora: {{r: 64}}
"""
        strategy = small_buckets(
            zero_stage=3,
            offload_optimizer=place,
            offload_param=place,
            micro_batch_size_per_gpu=2,
        )
        run = write_run(tmp_path / place.value, text, strategy, world_size=2)
        nursery.tokenize(run)
        outcome = nursery.train(run)
        assert outcome.returncode == 0, outcome.stderr
        losses[place] = outcome.losses
    assert losses[Offload.nvme] == pytest.approx(losses[Offload.cpu], abs=1e-4)
    assert losses[Offload.nvme][-1] < losses[Offload.nvme][0]
    written = [path for path in drive.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in written) > 1 << 20
