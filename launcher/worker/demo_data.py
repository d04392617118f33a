"""The demo's data: the docstrings of Python's own standard library as questions and answers.

Human text that is on every machine. The source files are parsed and never imported, so that
nothing runs. Use it as ``python -m launcher.worker.demo_data --out DIR``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import platform
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from launcher import run_dir
from launcher.errors import DataError, LauncherError, SetupError

TRAIN = "train.jsonl"
HELDOUT = "heldout.jsonl"
MIN_EXAMPLES = 1000
"""Fewer means that the library's sources are not what we think; Python 3.11 gives 2,753."""
MAX_EXAMPLES_PER_MODULE = 100
"""So that asyncio (220) and xml (156) do not outweigh a hundred small modules."""
MAX_HELDOUT_FRACTION = 0.10
MAX_ANSWER_CHARS = 400
"""Longer first paragraphs are lists or tables whose lines ran together."""
MIN_ANSWER_CHARS = 20
MIN_ANSWER_WORDS = 4
MIN_LETTERS_FRACTION = 0.8
"""Letters and spaces among the characters of an answer; code and tables have fewer."""

EXCLUDED_MODULES = frozenset(
    {"__main__", "antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "msilib"}
    | {"nturl2path", "pydoc_data", "test", "this", "tkinter", "turtle", "turtledemo"}
)
"""Games, vendored code, test suites, and what is deprecated or only on Windows."""
EXCLUDED_FOLDERS = frozenset({"__pycache__", "_bundled", "_vendor", "test", "tests"})
PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
"""Modules whose documented names live in a private file beside a C version."""

Kind = Literal["function", "class", "method", "attribute"]

QUESTIONS: dict[Kind, tuple[str, ...]] = {
    "function": (
        "What does `{name}` do in Python?",
        "What is the Python function `{name}` for?",
        "Describe the function `{name}` of Python's standard library.",
    ),
    "class": (
        "What is `{name}` in Python?",
        "What is the Python class `{name}` for?",
        "Describe the class `{name}` of Python's standard library.",
    ),
    "method": (
        "What does `{name}` do in Python?",
        "What is the Python method `{name}` for?",
        "Describe the method `{name}` of Python's standard library.",
    ),
    "attribute": (
        "What is `{name}` in Python?",
        "What does the Python attribute `{name}` hold?",
        "Describe the attribute `{name}` of Python's standard library.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question about a public name, and the first paragraph of its docstring."""

    module: str
    """Top-level module, the unit of the split between training and held-out data."""
    question: str
    answer: str

    def to_json_line(self) -> str:
        """Return the record in OpenAI's chat format, as one line."""
        messages = [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What :func:`write_demo_data` wrote."""

    train_path: str
    heldout_path: str
    num_train: int
    num_heldout: int
    num_train_modules: int
    num_heldout_modules: int
    train_sha256: str
    heldout_sha256: str
    python_version: str


def write_demo_data(out_dir: Path, *, library: Path | None = None) -> Summary:
    """Write ``train.jsonl`` and ``heldout.jsonl``; the same bytes on each run of one Python.

    No question and no answer occurs twice, and no module is in both files.

    Args:
        out_dir: created when missing.
        library: folder of the standard library's sources; this Python's when ``None``.

    Raises:
        SetupError: this Python has no standard library in source form.
        DataError: the folder cannot be written, or holds other files of these names.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    examples = collect_examples(library)
    if len(examples) < MIN_EXAMPLES:
        raise SetupError(
            f"only {len(examples)} usable docstrings, expected at least {MIN_EXAMPLES}",
            where=str(library),
            fix="use a Python whose standard library is installed as .py files",
        )
    train, heldout = split_by_module(examples)
    texts = {
        name: "".join(e.to_json_line() for e in part)
        for name, part in ((TRAIN, train), (HELDOUT, heldout))
    }
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _write_once(out_dir / name, text)
    except OSError as error:
        raise DataError(
            f"cannot write the demo data: {error.strerror or error}",
            where=str(out_dir),
            fix="choose a folder that can be written",
        ) from error
    return Summary(
        train_path=str(out_dir / TRAIN),
        heldout_path=str(out_dir / HELDOUT),
        num_train=len(train),
        num_heldout=len(heldout),
        num_train_modules=len({example.module for example in train}),
        num_heldout_modules=len({example.module for example in heldout}),
        train_sha256=hashlib.sha256(texts[TRAIN].encode()).hexdigest(),
        heldout_sha256=hashlib.sha256(texts[HELDOUT].encode()).hexdigest(),
        python_version=platform.python_version(),
    )


def collect_examples(library: Path) -> list[Example]:
    """Return the usable docstrings of all public names below ``library``, by module."""
    found: list[Example] = []
    questions: set[str] = set()
    answers: set[str] = set()
    for module, path in sorted(_source_files(library)):
        for example in examples_of_module(path.read_bytes(), module=module):
            if example.question in questions or example.answer.casefold() in answers:
                continue
            questions.add(example.question)
            answers.add(example.answer.casefold())
            found.append(example)
    return _limit_modules(found)


def examples_of_module(source: bytes, *, module: str) -> Iterator[Example]:
    """Yield the examples of one source file, in its order; nothing when it is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for name, kind, docstring in _public_docstrings(tree.body, exported=_exported_names(tree)):
        answer = first_paragraph(docstring)
        if is_prose(answer):
            full_name = f"{module}.{name}"
            phrasings = QUESTIONS[kind]
            # crc32, because hash() of a string differs from run to run.
            question = phrasings[zlib.crc32(full_name.encode()) % len(phrasings)]
            yield Example(
                module=module.partition(".")[0],
                question=question.format(name=full_name),
                answer=answer,
            )


def first_paragraph(docstring: str) -> str:
    """Return a docstring's text up to its first empty line, as one line."""
    return " ".join(re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0].split())


def is_prose(answer: str) -> bool:
    """Return whether a paragraph is a sentence for people, not a signature, list or table."""
    if not MIN_ANSWER_CHARS <= len(answer) <= MAX_ANSWER_CHARS:
        return False
    if len(answer.split()) < MIN_ANSWER_WORDS or not answer[0].isupper():
        return False
    if any(sign in answer for sign in ("->", ">>>", " -- ", "====", "----")) or answer[-1] == ":":
        return False
    letters = sum(character.isalpha() or character.isspace() for character in answer)
    return letters >= MIN_LETTERS_FRACTION * len(answer)


def split_by_module(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Split into training and held-out examples, about a tenth, so that no module is in both.

    Modules are tried in the order of their names' CRC-32, a fixed shuffle, and held out
    while the part stays within :data:`MAX_HELDOUT_FRACTION`.
    """
    sizes = Counter(example.module for example in examples)
    most = int(MAX_HELDOUT_FRACTION * len(examples))
    heldout: set[str] = set()
    num_heldout = 0
    for module in sorted(sizes, key=lambda name: (zlib.crc32(name.encode()), name)):
        if num_heldout + sizes[module] <= most:
            heldout.add(module)
            num_heldout += sizes[module]
    return (
        [example for example in examples if example.module not in heldout],
        [example for example in examples if example.module in heldout],
    )


def _limit_modules(examples: Sequence[Example]) -> list[Example]:
    """Keep a fixed random choice of each large module's examples, in their order."""
    kept: set[str] = set()
    sizes: Counter[str] = Counter()
    for example in sorted(examples, key=lambda e: (zlib.crc32(e.question.encode()), e.question)):
        if sizes[example.module] < MAX_EXAMPLES_PER_MODULE:
            sizes[example.module] += 1
            kept.add(example.question)
    return [example for example in examples if example.question in kept]


def _source_files(library: Path) -> Iterator[tuple[str, Path]]:
    """Yield (public dotted name, file) of the standard library's modules."""
    for name in sys.stdlib_module_names:
        public = PUBLIC_NAMES.get(name, name)
        if public.startswith("_") or public in EXCLUDED_MODULES:
            continue
        if (library / f"{name}.py").is_file():
            yield public, library / f"{name}.py"
        for path in (library / name).rglob("*.py"):
            parts = path.relative_to(library).with_suffix("").parts
            if EXCLUDED_FOLDERS.isdisjoint(parts):
                dotted = ".".join(parts).removesuffix(".__init__")
                if not any(part.startswith("_") for part in dotted.split(".")):
                    yield dotted, path


def _exported_names(tree: ast.Module) -> frozenset[str] | None:
    """Return the names in a literal ``__all__``; ``None`` when there is none to read."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            try:
                return frozenset(ast.literal_eval(node.value))
            except (ValueError, TypeError):
                return None
    return None


def _public_docstrings(
    body: Iterable[ast.stmt], *, exported: frozenset[str] | None = None, prefix: str = ""
) -> Iterator[tuple[str, Kind, str]]:
    """Yield (name, kind, docstring) of public definitions, also below ``if`` and ``try``."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            branches = [*node.body, *node.orelse]
            yield from _public_docstrings(branches, exported=exported, prefix=prefix)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        is_public = not node.name.startswith("_")
        if not is_public or (not prefix and exported and node.name not in exported):
            continue
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield prefix + node.name, _kind(node, is_member=bool(prefix)), docstring
        if isinstance(node, ast.ClassDef):
            yield from _public_docstrings(node.body, prefix=f"{prefix}{node.name}.")


def _kind(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, *, is_member: bool) -> Kind:
    if isinstance(node, ast.ClassDef):
        return "class"
    decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if decorators & {"property", "cached_property", "setter"}:
        return "attribute"
    return "method" if is_member else "function"


def _write_once(path: Path, text: str) -> None:
    if path.exists() and path.read_bytes() != text.encode():
        raise DataError(
            "the file exists and has other content",
            where=str(path),
            fix="move it away, or choose another folder",
        )
    run_dir.write_text(path, text)


def main(arguments: list[str] | None = None) -> int:
    """Write the data, print one line of JSON, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.demo_data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    options = parser.parse_args(arguments)
    try:
        summary = write_demo_data(options.out)
    except LauncherError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(asdict(summary)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
