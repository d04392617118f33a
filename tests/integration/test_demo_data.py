"""The demo's data: real docstrings, deterministic, and split by module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import DataError, SetupError
from launcher.worker import demo_data
from launcher.worker.demo_data import Example, Summary

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return demo_data.write_demo_data(tmp_path_factory.mktemp("data"))


def read(path: str) -> list[tuple[str, str]]:
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for record in records:
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
    return [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in records]


def module_of(question: str) -> str:
    return question.split("`")[1].split(".", maxsplit=1)[0]


def test_number_of_examples_suits_a_short_demo(written: Summary) -> None:
    assert 1000 <= written.num_train + written.num_heldout <= 3000
    assert len(read(written.train_path)) == written.num_train
    assert len(read(written.heldout_path)) == written.num_heldout


def test_heldout_part_is_eight_to_ten_percent(written: Summary) -> None:
    share = written.num_heldout / (written.num_train + written.num_heldout)
    assert 0.08 <= share <= 0.10


def test_no_module_is_in_both_parts(written: Summary) -> None:
    train = {module_of(question) for question, _ in read(written.train_path)}
    heldout = {module_of(question) for question, _ in read(written.heldout_path)}
    assert not train & heldout
    assert (len(train), len(heldout)) == (written.num_train_modules, written.num_heldout_modules)


def test_no_question_and_no_answer_occurs_twice(written: Summary) -> None:
    pairs = read(written.train_path) + read(written.heldout_path)
    assert len({question for question, _ in pairs}) == len(pairs)
    assert len({answer for _, answer in pairs}) == len(pairs)


def test_a_known_docstring_is_quoted_as_it_stands_in_the_source(written: Summary) -> None:
    answers = {
        question.split("`")[1]: answer
        for question, answer in read(written.train_path) + read(written.heldout_path)
    }
    # Lib/json/__init__.py, first lines of dumps() and of textwrap.dedent(), Python 3.11-3.13.
    assert answers["json.dumps"] == "Serialize ``obj`` to a JSON formatted ``str``."
    assert answers["textwrap.dedent"].startswith("Remove any common leading whitespace from every")


def test_another_hash_seed_gives_the_same_bytes_and_nothing_parsed_is_imported(
    written: Summary, tmp_path: Path
) -> None:
    code = (
        "import sys; from launcher.worker import demo_data;"
        f"status = demo_data.main(['--out', {str(tmp_path)!r}]);"
        "parsed = {'torch', 'asyncio', 'tarfile', 'mailbox', 'unittest', 'xmlrpc'};"
        "print(sorted(parsed & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"
    assert json.loads(done.stdout)["train_sha256"] == written.train_sha256
    assert (tmp_path / "train.jsonl").read_bytes() == Path(written.train_path).read_bytes()
    assert (tmp_path / "heldout.jsonl").read_bytes() == Path(written.heldout_path).read_bytes()


@pytest.fixture
def small_library(tmp_path: Path) -> Path:
    """Twelve modules of a hundred functions each, under names of the standard library."""
    names = ["abc", "ast", "bdb", "cmd", "csv", "dis", "glob", "gzip", "hmac", "heapq", "json"]
    words = ["pears", "plums", "figs", "dates", "limes", "nuts", "peas", "leeks", "yams"]
    names, words = [*names, "stat"], [*words, "onions", "chives", "apples"]
    folder = tmp_path / "library"
    folder.mkdir()
    for name, word in zip(names, words, strict=True):
        functions = [
            f'def {"q" * n}():\n    """Count all the {word} of {"very " * n}large trees."""\n'
            for n in range(1, 61)
        ] + [
            f'def {"z" * n}():\n    """Plant all the {word} near {"very " * n}tall walls."""\n'
            for n in range(1, 61)
        ]
        (folder / f"{name}.py").write_text("".join(functions))
    return folder


def test_no_module_gives_more_than_a_hundred_examples(small_library: Path) -> None:
    examples = demo_data.collect_examples(small_library)
    assert len(examples) == 12 * 100


def test_writing_twice_into_one_folder_is_fine(small_library: Path, tmp_path: Path) -> None:
    first = demo_data.write_demo_data(tmp_path / "data", library=small_library)
    assert demo_data.write_demo_data(tmp_path / "data", library=small_library) == first


def test_a_file_of_the_same_name_is_never_overwritten(small_library: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match=r"train\.jsonl: the file exists"):
        demo_data.write_demo_data(tmp_path, library=small_library)
    assert (tmp_path / "train.jsonl").read_text() == "mine\n"


def test_a_folder_that_cannot_be_made_is_a_data_error(small_library: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the demo data"):
        demo_data.write_demo_data(tmp_path / "file" / "data", library=small_library)


def test_a_python_without_its_sources_is_a_setup_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="only 0 usable docstrings"):
        demo_data.write_demo_data(tmp_path / "data", library=tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "D.keys() -> a set-like object that shows the keys of D",
        "Return the sum -> int of all the given numbers here",
        "os.path.join of several parts, without a capital",
        "A table of [1, 2, 3], {4: 5}, (6, 7), <8>, 9 + 10 == 19",
        "Supercalifragilistic expialidocious",
        "The options are as follows:",
        "Long. " * 100,
    ],
)
def test_signatures_tables_and_fragments_are_not_prose(text: str) -> None:
    assert not demo_data.is_prose(text)


def test_first_paragraph_ends_at_the_first_empty_line_and_is_one_line() -> None:
    docstring = "Wrap text\n        in a paragraph.\n   \n        More.\n        "
    assert demo_data.first_paragraph(docstring) == "Wrap text in a paragraph."


SOURCE = b'''
__all__ = ["Shape", "area"]
try:
    import fast
except ImportError:
    fast = None
def hidden_because_not_exported():
    """Return nothing that anyone may use."""
def _private():
    """Return nothing that anyone may see."""
if fast is None:
    def area(shape):
        """Return the area of a shape in square metres."""
class Shape:
    """Base class of all flat figures."""
    @property
    def name(self):
        """Name of the figure in plain English."""
    def scale(self, factor):
        """Multiply all lengths by a factor."""
    def _secret(self):
        """Do what nobody should ever know."""
'''


def test_only_exported_public_names_become_questions() -> None:
    found = [
        (example.question.split("`")[1], example.answer)
        for example in demo_data.examples_of_module(SOURCE, module="figures.flat")
    ]
    assert found == [
        ("figures.flat.area", "Return the area of a shape in square metres."),
        ("figures.flat.Shape", "Base class of all flat figures."),
        ("figures.flat.Shape.name", "Name of the figure in plain English."),
        ("figures.flat.Shape.scale", "Multiply all lengths by a factor."),
    ]


def test_a_file_that_is_not_python_gives_no_examples() -> None:
    assert list(demo_data.examples_of_module(b"print 'two'", module="old")) == []


def test_a_module_too_large_to_hold_out_stays_in_the_training_part() -> None:
    def example(module: str, number: int) -> Example:
        return Example(module=module, question=f"{module} {number}?", answer=f"{module} {number}")

    examples = [example("large", n) for n in range(95)] + [example("small", n) for n in range(5)]
    train, heldout = demo_data.split_by_module(examples)
    assert {e.module for e in train} == {"large"}
    assert {e.module for e in heldout} == {"small"}
