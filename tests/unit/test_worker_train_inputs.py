from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import ModelError, RunDirError, SetupError
from launcher.planning.plan import strategy_to_json
from launcher.strategy import Attention, Loss, Method, Precision, Strategy
from launcher.worker.prerequisites import check_packages
from launcher.worker.ranks import Ranks, ranks_from_environment
from launcher.worker.train import read_inputs
from launcher.worker.vocabulary import check_vocabulary


def write_inputs(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("model: {name_or_path: m}\n")
    plan = {"strategy": strategy_to_json(Strategy(zero_stage=3)), "precision": "bf16"}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "ds_config.json").write_text('{"train_batch_size": 8}')


def test_a_package_built_for_another_torch_is_named_with_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "undefined symbol: _ZNK3c105Error4whatEv"
    (tmp_path / "flash_attn.py").write_text(f"raise ImportError({said!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    strategy = Strategy(zero_stage=2, attention=Attention.flash_attention_2)
    with pytest.raises(SetupError, match=said) as caught:
        check_packages(Method.full, strategy)
    assert "built for this torch" in caught.value.fix
    (tmp_path / "flash_attn.py").write_text("")
    check_packages(Method.full, strategy)


def test_the_deepspeed_launchers_variables_say_the_rank() -> None:
    environment = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "SLURM_PROCID": "0"}
    assert ranks_from_environment(environment) == Ranks(rank=5, local_rank=1, world_size=8)


def test_slurms_variables_say_the_rank_under_srun() -> None:
    environment = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "4",
        "MASTER_ADDR": "node1",
    }
    assert ranks_from_environment(environment) == Ranks(rank=3, local_rank=1, world_size=4)


def test_a_process_started_by_hand_inside_an_allocation_is_alone() -> None:
    # salloc sets SLURM_PROCID in the shell too, but nobody set MASTER_ADDR there.
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert ranks_from_environment(environment) == Ranks(rank=0, local_rank=0, world_size=1)


def test_the_run_directory_says_all(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    inputs = read_inputs(tmp_path)
    assert inputs.strategy.zero_stage == 3
    assert inputs.strategy.loss is Loss.full
    assert inputs.precision is Precision.bf16
    assert inputs.ds_config == {"train_batch_size": 8}


@pytest.mark.parametrize("name", ["recipe.yaml", "plan.json", "ds_config.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_inputs(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(RunDirError, match=f"there is no {name}") as caught:
        read_inputs(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_half_a_plan_is_an_error(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "plan.json").write_text('{"strategy": ')
    with pytest.raises(RunDirError, match="not JSON"):
        read_inputs(tmp_path)


def test_a_plan_without_a_precision_is_an_error(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "plan.json").write_text('{"strategy": {}}')
    with pytest.raises(RunDirError, match="precision"):
        read_inputs(tmp_path)


def test_tokens_without_rows_in_the_embedding_are_refused() -> None:
    check_vocabulary(299, 300, source="here")
    with pytest.raises(ModelError) as caught:
        check_vocabulary(300, 300, source="here")
    assert caught.value.problem == (
        "the data has token 300, the model's embedding has 300 rows (0 to 299): the tokenizer and "
        "the weights do not belong together"
    )
    assert "model.resize_token_embeddings(len(tokenizer))" in caught.value.fix
