"""Weights are saved file by file, whole, under the names that checkpoints have."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from worker_runs import Nursery

from launcher.worker.weight_files import deal_into_files, save_model

pytestmark = pytest.mark.integration


def plain_engine(model: torch.nn.Module) -> SimpleNamespace:
    return SimpleNamespace(module=model, zero_optimization_partition_weights=lambda: False)


def test_a_layer_is_never_dealt_over_two_files() -> None:
    sizes = {"embed": 30, "layers.0.a": 20, "layers.0.b": 20, "layers.10.a": 50, "norm": 1}
    files = deal_into_files(sizes, limit_bytes=60)
    assert files == [["embed"], ["layers.0.a", "layers.0.b"], ["layers.10.a", "norm"]]
    assert deal_into_files(sizes, limit_bytes=1000) == [list(sizes)]
    assert deal_into_files({"layers.0.a": 5, "x": 1}, limit_bytes=3) == [["layers.0.a"], ["x"]]


def test_zero_3_saves_with_one_file_of_the_model_on_one_host(
    nursery: Nursery, tmp_path: Path
) -> None:
    from saving_rank import whole_model
    from transformers import LlamaForCausalLM

    outcome = nursery.run(tmp_path, "saving_rank", world_size=2)
    assert outcome.returncode == 0, outcome.stderr
    saved = tmp_path / "saved-0"
    # A layer has 4 x 512 x 512 + 3 x 512 x 2048 weights of 4 bytes, 16.8 MB: one a file. The
    # first has the embedding, the last the norm and the output layer.
    assert len(list(saved.glob("model-0000?-of-00008.safetensors"))) == 8
    assert not (saved / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "saved-1").iterdir()] == ["config.json"]
    reloaded = LlamaForCausalLM.from_pretrained(saved).state_dict()
    for name, value in whole_model().state_dict().items():
        assert torch.equal(reloaded[name], value), name
    # A file, and the parts and the whole of the tensor that is gathered, 23 to 25 MB; on the rank
    # that does not write only the latter, 10 to 11. All of the model would be 134.
    first, second = (json.loads((tmp_path / f"peak-{i}.json").read_text()) for i in (0, 1))
    assert first < 50_000_000
    assert second < 25_000_000


def test_experts_are_saved_under_the_names_that_their_checkpoints_have(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, eos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.config.save_pretrained(tmp_path)
    save_model(plain_engine(model), tmp_path, is_writer=True, file_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    # As in Mixtral's own files: each expert has its matrices w1, w2 and w3.
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in index["weight_map"]
    assert len(set(index["weight_map"].values())) == 2
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    reloaded = MixtralForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(reloaded[name], value), name
