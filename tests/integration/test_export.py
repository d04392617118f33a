"""Export: a good checkpoint passes, and each known way of breaking one is a named error."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_above_start import AnonymousMemory
from safetensors.torch import load_file, save_file

from launcher.errors import LauncherError, RunDirError
from launcher.worker import export as export_module
from launcher.worker import export_logits
from launcher.worker.export import export_run
from launcher.worker.export_checks import ExportError, expected_adapter, expected_model
from launcher.worker.export_merge import write_merged

pytestmark = [
    pytest.mark.integration,
    # peft 0.21 reads a property that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ADAPTER = "checkpoints/final/adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]
# Llama with 2 layers, hidden 32, 4 heads of 8, 2 KV heads, MLP 64; LoRA of rank 4 on
# 7 linear modules a layer: 2 x 7 x 2 = 28 tensors, and by hand, in + out per module:
# q 64, k 48, v 48, o 64, gate 96, up 96, down 96 = 512; x rank 4 x 2 layers = 4096.
NUM_TENSORS, NUM_PARAMS = 28, 4096


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    return write_base(tmp_path_factory.mktemp("base"), LlamaForCausalLM(config))


def write_base(folder: Path, model: Any) -> Path:
    """Write a model, and a tokenizer for the words of the export's prompt."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    unknown = "<unk>"
    words = [unknown, "What", "does", "textwrap", "wrap", "do", "in", "Python", "?", "`", "."]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown).save_pretrained(folder)
    return folder


def write_recipe(run: Path, base: Path, method: str, more: str = "") -> None:
    data = run / "data.jsonl"
    data.write_text('{"text": "hello"}\n')
    (run / "recipe.yaml").write_text(
        f"model:\n  name_or_path: {base}\n{more}method: {method}\ndata:\n  path: {data}\n"
    )


def copy_tokenizer(base: Path, target: Path) -> None:
    for path in base.glob("tokenizer*"):
        shutil.copyfile(path, target / path.name)


@pytest.fixture
def lora_run(base: Path, tmp_path: Path) -> Path:
    """A run directory as the trainer leaves it, with B matrices that are not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    final = run / "checkpoints" / "final"
    final.mkdir(parents=True)
    write_recipe(run, base, "lora")
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(final)
    copy_tokenizer(base, final)
    (final / "optimizer.pt").write_bytes(b"state of the trainer")
    return run


@pytest.fixture
def full_run(base: Path, tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    final = run / "checkpoints" / "final"
    final.mkdir(parents=True)
    write_recipe(run, base, "full")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data += 0.1
    model.save_pretrained(final)
    copy_tokenizer(base, final)
    return run


def change(run: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(run / ADAPTER)
    edit(tensors)
    save_file(tensors, run / ADAPTER, metadata={"format": "pt"})


def test_a_good_adapter_is_exported_with_its_verification(
    lora_run: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export = export_run(lora_run, out)
    assert export == json.loads((out / "export.json").read_text())
    assert export["tensors"]["num_tensors"] == NUM_TENSORS
    assert export["tensors"]["num_params"] == NUM_PARAMS
    assert export["tensors"]["num_zero_lora_b"] == 0
    assert export["logits"]["from_checkpoint"] == 0.0
    assert export["logits"]["from_base"] > 0.01
    assert (out / "adapter_config.json").is_file()
    assert (out / "tokenizer.json").is_file()
    assert not (out / "optimizer.pt").exists()
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    assert hashlib.sha256(b'{"text": "hello"}\n').hexdigest() in card
    weights = (out / "adapter_model.safetensors").read_bytes()
    assert export["files"]["adapter_model.safetensors"] == {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_merged_model_is_an_ordinary_folder_that_computes_the_same(
    lora_run: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    export = export_run(lora_run, out, kind="merged")
    # fp32 throughout: only the order of additions differs.
    assert export["logits"]["merged_from_adapter"] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert not hasattr(merged, "peft_config")
    assert (out / "merged" / "tokenizer.json").is_file()
    assert "merged/model.safetensors" in export["files"]


def test_merging_holds_one_file_and_one_layer_of_the_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8, dtype=torch.bfloat16,
    )  # fmt: skip
    # A layer has 4 x 1024 x 1024 + 3 x 1024 x 4096 weights of 2 bytes, 33.6 MB; the largest
    # matrix takes 16.8 MB in fp32, and merging holds it, its copy and its change.
    model_bytes, largest_bytes, file_bytes = 6 * 33_554_432, 16_777_216, 36 * 10**6
    run = tmp_path / "run"
    final = run / "checkpoints" / "final"
    export_module._hand_back_freed_memory()  # before the model, whose memory is free again later
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    model = empty.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    write_base(tmp_path / "base", model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    adapted.save_pretrained(final)
    copy_tokenizer(tmp_path / "base", final)
    write_recipe(run, tmp_path / "base", "lora")
    del empty, model, adapted
    small_files = functools.partial(write_merged, file_bytes=file_bytes)
    monkeypatch.setattr(export_logits, "write_merged", small_files)
    with AnonymousMemory() as memory:
        export_run(run, tmp_path / "out", kind="merged")
    merged = tmp_path / "out" / "merged"
    # A layer a file.
    sizes = [path.stat().st_size for path in merged.glob("model-*.safetensors")]
    assert len(sizes) > model_bytes // file_bytes
    assert max(sizes) < file_bytes + 10_000
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for path in merged.glob("model-*") for value in load_file(path).values()
    )
    assert memory.peak_bytes < file_bytes + 3 * largest_bytes + 10**7
    assert memory.peak_bytes < model_bytes / 2


def test_a_good_full_model_is_exported(full_run: Path, tmp_path: Path) -> None:
    export = export_run(full_run, tmp_path / "out")
    assert export["kind"] == "model"
    # By hand: embedding 64 x 32; a layer: q 1024, k 512, v 512, o 1024, MLP 3 x 2048 and two
    # norms of 32 = 9280; two layers and the last norm.
    assert export["tensors"]["num_params"] == 2048 + 2 * 9280 + 32
    assert export["logits"]["from_checkpoint"] == 0.0
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


def empty_one(tensors: Tensors) -> None:
    tensors[sorted(tensors)[0]] = torch.empty(0)


def empty_all(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name] = torch.empty(0)


def one_nan(tensors: Tensors) -> None:
    tensors[sorted(tensors)[3]][0, 0] = float("nan")


def one_infinity(tensors: Tensors) -> None:
    tensors[sorted(tensors)[3]][0, 0] = float("inf")


def drop_one(tensors: Tensors) -> None:
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]


def drop_a_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if "layers.1" in name]:
        del tensors[name]


def zero_all_b(tensors: Tensors) -> None:
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def transpose_one(tensors: Tensors) -> None:
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].T.contiguous()


def add_unknown(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"] = torch.ones(32, 4)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (empty_one, r"lora_A\.weight is empty: its partitions were not gathered .*ZeRO-3"),
        (empty_all, r"9 problems[\s\S]* is empty[\s\S]*and 20 more tensors"),
        (one_nan, r"has 1 values that are NaN or infinite"),
        (one_infinity, r"has 1 values that are NaN or infinite"),
        (drop_one, r"layers\.1\.mlp\.down_proj\.lora_B\.weight is missing"),
        (drop_a_layer, r"layers\.1\..* is missing"),
        (zero_all_b, r"the adapter is as it was initialised: all its lora_B tensors are zero"),
        (transpose_one, r"has shape \(64, 4\), expected \(4, 64\)"),
        (add_unknown, r"layers\.2\.mlp\.down_proj\.lora_B\.weight belongs to no module"),
    ],
)
def test_a_broken_adapter_is_named_and_nothing_is_exported(
    lora_run: Path, tmp_path: Path, edit: Callable[[Tensors], None], message: str
) -> None:
    change(lora_run, edit)
    with pytest.raises(ExportError, match=message) as caught:
        export_run(lora_run, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("num_bytes", [0, 4, 200, 9000])
def test_a_truncated_file_is_named(lora_run: Path, tmp_path: Path, num_bytes: int) -> None:
    path = lora_run / ADAPTER
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors: the file is damaged"):
        export_run(lora_run, tmp_path / "out")


def test_a_missing_weights_file_names_every_tensor(lora_run: Path, tmp_path: Path) -> None:
    (lora_run / ADAPTER).unlink()
    with pytest.raises(ExportError, match="is missing"):
        export_run(lora_run, tmp_path / "out")


def test_one_untrained_matrix_is_reported_and_does_not_stop_the_export(
    lora_run: Path, tmp_path: Path
) -> None:
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    change(lora_run, lambda tensors: tensors[name].zero_())
    export = export_run(lora_run, tmp_path / "out")
    assert export["tensors"]["num_zero_lora_b"] == 1
    assert {"name": "LoRA B matrices that no step changed", "result": "1"} in export["checks"]


def test_a_full_model_that_no_step_changed_is_an_error(
    full_run: Path, base: Path, tmp_path: Path
) -> None:
    shutil.copyfile(
        base / "model.safetensors", full_run / "checkpoints" / "final" / "model.safetensors"
    )
    with pytest.raises(ExportError, match="exactly what the base model computes"):
        export_run(full_run, tmp_path / "out")


def test_a_full_model_with_a_missing_tensor_is_an_error(full_run: Path, tmp_path: Path) -> None:
    path = full_run / "checkpoints" / "final" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"model\.norm\.weight is missing"):
        export_run(full_run, tmp_path / "out")


def test_an_existing_folder_is_never_overwritten(lora_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RunDirError, match="exists already"):
        export_run(lora_run, out)
    assert list(out.iterdir()) == []


def test_a_run_that_did_not_finish_has_nothing_to_export(lora_run: Path, tmp_path: Path) -> None:
    shutil.rmtree(lora_run / "checkpoints")
    with pytest.raises(RunDirError, match="no final checkpoint"):
        export_run(lora_run, tmp_path / "out")


def test_a_folder_that_is_no_run_directory_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(LauncherError) as caught:
        export_run(tmp_path, tmp_path / "out")
    assert caught.value.exit_code == 2


def test_an_adapter_is_not_a_full_model(lora_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="--kind merged"):
        export_run(lora_run, tmp_path / "out", kind="full")


def test_a_full_model_cannot_be_merged(full_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="has no adapter"):
        export_run(full_run, tmp_path / "out", kind="merged")


def test_a_checkpoint_without_tokenizer_is_an_error(lora_run: Path, tmp_path: Path) -> None:
    for path in (lora_run / "checkpoints" / "final").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ExportError, match="no tokenizer"):
        export_run(lora_run, tmp_path / "out")


def test_a_base_model_that_is_gone_is_named(lora_run: Path, tmp_path: Path) -> None:
    write_recipe(lora_run, tmp_path / "gone", "lora")
    with pytest.raises(LauncherError, match="gone"):
        export_run(lora_run, tmp_path / "out")


def test_random_base_weights_say_that_logits_were_not_compared(
    lora_run: Path, base: Path, tmp_path: Path
) -> None:
    write_recipe(lora_run, base, "lora", more="  random_weights: true\n")
    export = export_run(lora_run, tmp_path / "out")
    assert export["logits"] is None
    assert any("not compared" in check["result"] for check in export["checks"])


def test_main_prints_one_line_of_json_and_errors_have_their_exit_status(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--run-dir", str(lora_run), "--out", str(tmp_path / "out")]
    assert export_module.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "out")
    assert export_module.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    change(lora_run, zero_all_b)
    assert export_module.main([*arguments[:3], str(tmp_path / "other")]) == 4
    assert "as it was initialised" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.0.*\.(up|down)_proj"},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["embed_tokens", "o_proj"]},
    ],
)
def test_expected_tensors_are_those_that_peft_saves(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(base)
    expected = expected_adapter(plain, config, where="adapter_config.json")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert dict(expected.required) == {name: tuple(t.shape) for name, t in saved.items()}


def test_a_tied_output_layer_may_be_saved_or_left_out(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = expected_model(AutoModelForCausalLM.from_pretrained(base))
    assert dict(expected.optional) == {"lm_head.weight": (64, 32)}
    assert "model.embed_tokens.weight" in expected.required


def test_parts_that_are_not_known_are_refused(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "bias": "all"}
    with pytest.raises(ExportError, match="bias is 'all'"):
        expected_adapter(model, config, where="adapter_config.json")
