"""Files, folders and hub data sets as sources, and the rows that become of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_recipes import lines, recipe_of, texts, tokens_of
from fake_hub import fake_hub
from worker_runs import environment, make_model, make_tokenizer, write_chats

from launcher.data_cache import TRAIN, load_summary
from launcher.errors import DataError
from launcher.recipe_sections import DataSource
from launcher.worker.chat_templates import load_tokenizer
from launcher.worker.data import prepare_data
from launcher.worker.data_sources import OpenSource, open_source
from launcher.worker.data_writer import read_rows

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def test_sources_are_mixed_by_their_weights(tmp_path: Path, model: Path) -> None:
    texts(tmp_path / "a.jsonl", "a0", "a1", "a2", "a3")
    lines(tmp_path / "b.jsonl", [{"q": "b", "a": "0"}, {"q": "b", "a": "1"}])
    data = (
        f"{{sources: [{{path: {tmp_path}/a.jsonl, weight: 0.5}}, {{path: {tmp_path}/b.jsonl, "
        "weight: 1.5, columns: {prompt: q, completion: a}}]}"
    )
    rows, summary = tokens_of(recipe_of(model, data), tmp_path / "cache")
    # Half of four, every second one; one and a half times two.
    assert rows == [f"{text}<|end|>" for text in ("a1", "a3", "b0", "b1", "b1")]
    found = [(source.format, source.num_records) for source in summary.train.sources]
    assert found == [("text", 4), ("prompt_completion", 2)]
    assert summary.format == "prompt_completion, text"


def test_a_folder_is_read_by_split_as_datasets_names_them(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "set"
    texts(folder / "data" / "train-00000-of-00002.jsonl", "t0")
    texts(folder / "data" / "train-00001-of-00002.jsonl", "t1")
    texts(folder / "data" / "test-00000-of-00001.jsonl", "h0")
    (folder / "README.md").write_text("# A set\n")
    data = f"{{path: {folder}, eval_path: {folder}}}"
    rows, summary = tokens_of(recipe_of(model, data), tmp_path / "cache")
    assert rows == ["t0<|end|>", "t1<|end|>"]
    assert summary.eval is not None
    assert summary.eval.num_examples == 1
    with pytest.raises(DataError, match="no split 'validation', found test, train") as caught:
        open_source("data.eval_path", DataSource(path=str(folder), split="validation"))
    assert caught.value.fix == "set data.eval_split to one of those"


def test_a_folder_that_describes_itself_has_configurations(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    texts(folder / "easy.jsonl", "e")
    texts(folder / "hard.jsonl", "h")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy.jsonl\n"
        "- config_name: hard\n  data_files: hard.jsonl\n---\n"
    )
    opened = open_source("data.path", DataSource(path=str(folder), subset="hard"))
    assert [path.name for path in opened.files] == ["hard.jsonl"]
    with pytest.raises(DataError, match=r"easy.*hard") as caught:
        open_source("data.path", DataSource(path=str(folder)))
    assert "data.subset" in caught.value.fix


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one, other = Dataset.from_dict({"text": ["a"]}), Dataset.from_dict({"text": ["b", "c"]})
    DatasetDict({"train": one, "test": other}).save_to_disk(tmp_path / "saved")
    for split, expected in (("train", ["a"]), ("test", ["b", "c"])):
        opened = open_source("data.path", DataSource(path=str(tmp_path / "saved"), split=split))
        assert [record["text"] for _, record in opened.records()] == expected
    with pytest.raises(DataError, match="no split 'dev', found test, train"):
        open_source("data.path", DataSource(path=str(tmp_path / "saved"), split="dev"))


def test_a_folder_with_files_of_several_kinds_or_none_is_refused(tmp_path: Path) -> None:
    texts(tmp_path / "set" / "a.jsonl", "a")
    (tmp_path / "set" / "b.csv").write_text("text\nb\n")
    with pytest.raises(DataError, match=r"several kinds: \.csv, \.jsonl"):
        open_source("data.path", DataSource(path=str(tmp_path / "set")))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no data file in this folder"):
        open_source("data.path", DataSource(path=str(tmp_path / "none")))


def test_a_hub_id_without_a_network_says_what_to_do() -> None:
    with pytest.raises(DataError) as caught:
        open_source("data.path", DataSource(path="owner/no-such-set"))
    assert caught.value.where == "owner/no-such-set"
    assert "without a network, copy the data here" in caught.value.fix


OPEN_SOURCES = """
import json
from launcher.errors import LauncherError
from launcher.model_source import find_config
from launcher.recipe_sections import DataSource
from launcher.worker.data_sources import open_source

for name in ("owner/chats", "owner/gated-chats", "owner/nothing", "model"):
    try:
        if name == "model":
            find_config("owner/gated-model")
        opened = open_source("data.path", DataSource(path=name))
        print(json.dumps(list(opened.records())))
    except LauncherError as error:
        print(json.dumps([error.problem, error.where, error.fix]))
"""


def test_a_hub_id_is_read_and_what_is_gated_or_private_says_how_to_log_in(tmp_path: Path) -> None:
    # A process of its own: huggingface_hub reads the hub's address when it is imported.
    own = {key: value for key, value in environment().items() if key != "HF_HUB_OFFLINE"}
    with fake_hub({"train.jsonl": b'{"text": "one"}\n{"text": "two"}\n'}) as address:
        done = subprocess.run(
            [sys.executable, "-c", OPEN_SOURCES],
            env={**own, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_TOKEN": ""},
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    chats, gated, nothing, model = found
    assert chats == [["owner/chats row 1", {"text": "one"}], ["owner/chats row 2", {"text": "two"}]]
    assert "'owner/gated-chats' is a gated dataset on the Hub" in gated[0]
    login = "run `hf auth login` or set HF_TOKEN"
    licence = "accept the licence at https://huggingface.co/"
    page = "datasets/owner/gated-chats"
    assert gated[1:] == ["owner/gated-chats", f"{licence}{page}, then {login}"]
    assert nothing[1:] == ["owner/nothing", f"check the spelling; for a private one {login}"]
    fix = f"{licence}owner/gated-model, then {login}"
    assert model == ["its owner must grant you access", "hub model owner/gated-model", fix]


def test_an_empty_split_of_a_hub_data_set_is_named() -> None:
    from datasets import Dataset

    source = DataSource(path="owner/chats", split="test")
    opened = OpenSource(
        source=source, key="data.eval_path", dataset=Dataset.from_dict({"text": []})
    )
    with pytest.raises(DataError, match="the split 'test' holds no records") as caught:
        list(opened.records())
    assert caught.value.where == "owner/chats"


def test_system_texts_that_a_template_leaves_out_are_counted(tmp_path: Path, model: Path) -> None:
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
    chats = [[{"role": "system", "content": "Be brief."}, *turns]] * 3 + [turns]
    data = lines(tmp_path / "train.jsonl", [{"messages": chat} for chat in chats])
    template = Path(__file__).parents[1] / "data" / "chat_templates" / "mistral.jinja"
    recipe = recipe_of(model, f"{{path: {data}, chat_template: {template}}}")
    rows, summary = tokens_of(recipe, tmp_path / "cache")
    assert "Be brief" not in "".join(rows)
    assert (
        "the chat template leaves out the system text of 3 conversations: put it into their first "
        "user turn, or set data.chat_template"
    ) in summary.notes
    other, summary = tokens_of(
        recipe_of(model, f"{{path: {data}, chat_template: zephyr}}"), tmp_path / "cache"
    )
    assert "".join(other).count("Be brief.") == 3
    assert not any("system text" in note for note in summary.notes)


def test_rows_of_a_loaded_data_set_have_no_nulls_in_their_turns() -> None:
    from datasets import Dataset

    from launcher.worker.data_sources import OpenSource

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    dataset = Dataset.from_list([{"messages": turns}])
    opened = OpenSource(source=DataSource(path="o/n"), key="data.path", dataset=dataset)
    assert list(opened.records()) == [("o/n row 1", {"messages": turns})]
    assert opened.digest == f"o/n {dataset._fingerprint}"


def test_a_model_without_a_template_takes_one_by_name_or_file(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "bare", chat_template=None)
    data = write_chats(tmp_path / "train.jsonl", 1)
    with pytest.raises(DataError, match="no chat template, which messages records need") as caught:
        tokens_of(recipe_of(tmp_path / "bare", f"{{path: {data}}}"), tmp_path / "cache")
    assert "data.chat_template to a file or one of zephyr" in caught.value.fix
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    for template, expected in (
        ("zephyr", "<|user|>\ncount to 1<|end|>\n<|assistant|>\n1<|end|>\n"),
        (str(tmp_path / "own.jinja"), "[count to 1][1]"),
    ):
        recipe = recipe_of(tmp_path / "bare", f"{{path: {data}, chat_template: {template}}}")
        assert tokens_of(recipe, tmp_path / "cache")[0] == [expected]
    (tmp_path / "own.jinja").write_text("{% for m in messages %}")
    for template, problem in (
        ("chatml", "needs tokens that the tokenizer lacks: <|im_start|>, <|im_end|>"),
        ("chatlm", "no known template 'chatlm'"),
        (str(tmp_path / "own.jinja"), "not a Jinja template: line 1"),
    ):
        recipe = recipe_of(tmp_path / "bare", f"{{path: {data}, chat_template: {template}}}")
        with pytest.raises(DataError) as refused:
            load_tokenizer(recipe)
        assert problem in refused.value.problem


def test_tools_that_a_template_has_no_place_for_are_an_error(tmp_path: Path, model: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tool = {"type": "function", "function": {"name": "f"}}
    data = lines(tmp_path / "train.jsonl", [{"messages": turns, "tools": [tool]}])
    with pytest.raises(DataError, match="no place for them") as caught:
        tokens_of(recipe_of(model, f"{{path: {data}}}"), tmp_path / "cache")
    assert caught.value.where == "train.jsonl line 1"


def test_half_a_surrogate_pair_is_named(tmp_path: Path, model: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "ok"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match="half of a character") as caught:
        tokens_of(recipe_of(model, f"{{path: {tmp_path}/train.jsonl}}"), tmp_path / "cache")
    assert caught.value.where == "train.jsonl line 2"


def test_the_end_token_counts_although_it_pads(tmp_path: Path, model: Path) -> None:
    recipe = recipe_of(model, f"{{path: {texts(tmp_path / 'train.jsonl', 'abc')}}}")
    tokenizer = load_tokenizer(recipe)
    folder = prepare_data(recipe, tokenizer, tmp_path / "cache")
    assert load_summary(folder).pad_token_id == tokenizer.eos_token_id
    assert read_rows(folder / TRAIN)[0]["labels"][-1] == tokenizer.eos_token_id


def test_packed_rows_hold_whole_examples(tmp_path: Path, model: Path) -> None:
    values = ["x" * length for length in (9, 3, 7, 5, 2)]
    data = texts(tmp_path / "train.jsonl", *values)
    recipe = recipe_of(model, f"{{path: {data}, eval_path: {data}, packing: true}}", max_seq_len=12)
    rows, summary = tokens_of(recipe, tmp_path / "cache")
    # With the end token 10, 4, 8, 6 and 3 tokens; best fit: 10, then 8 + 4, then 6 + 3.
    assert [len(row.replace("<|end|>", "|")) for row in rows] == [10, 12, 9]
    stored = read_rows(prepare_data(recipe, load_tokenizer(recipe), tmp_path / "cache") / TRAIN)
    assert [list(row) for row in stored["example_lengths"]] == [[10], [8, 4], [6, 3]]
    assert all(row["labels"][0] == -100 for row in stored)
    assert stored[1]["labels"][8] == -100
    assert summary.train.num_sequences == 3
    assert summary.eval is not None
    assert summary.eval.num_sequences == 5
