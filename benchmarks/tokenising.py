"""Measure how long tokenising takes and how much memory: generated chats, a real tokenizer.

usage: python benchmarks/tokenising.py MODEL_FOLDER [NUM_EXAMPLES]
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from launcher.units import MIB

# The most frequent words of English prose, so that the tokenizer meets real merges.
WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were her all she there would their we him been has when who will more no if
out so said what up its about into than them can only other new some could time these two may then
do first any my now such like our over man me even most made after
"""


def write_chats(path: Path, count: int) -> None:
    """Write two-turn conversations of 20 to 1,000 words, log-uniform."""
    numbers = random.Random(0)  # noqa: S311 - the same chats every time
    known = WORDS.split()

    def words() -> str:
        return " ".join(numbers.choices(known, k=round(10 * 50 ** numbers.random())))

    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            turns = [
                {"role": role, "content": words()}
                for role in ("user", "assistant", "user", "assistant")
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")


def main() -> None:
    model = str(Path(sys.argv[1]).resolve())
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 50_000
    for packing in (False, True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_chats(folder / "train.jsonl", count)
            recipe = {
                "model": {"name_or_path": model},
                "max_seq_len": 2048,
                "data": {"path": str(folder / "train.jsonl"), "packing": packing},
            }
            (folder / "recipe.yaml").write_text(json.dumps(recipe))
            argv = [sys.executable, "-m", "launcher.worker.data", "--recipe", "recipe.yaml"]
            started = time.perf_counter()
            done = subprocess.run(
                [*argv, "--cache", "cache"], cwd=folder, stdout=subprocess.PIPE, check=True
            )
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            subprocess.run([*argv, "--cache", "cache"], cwd=folder, stdout=-3, check=True)
            train = json.loads(done.stdout)["train"]
            found = {
                "model": Path(model).name,
                "packing": packing,
                "num_records": count,
                "file_bytes": (folder / "train.jsonl").stat().st_size,
                "num_tokens": train["num_tokens"],
                "num_sequences": train["num_sequences"],
                "seconds": round(seconds, 1),
                "seconds_from_cache": round(time.perf_counter() - started, 1),
                # The largest of all children so far.
                "peak_resident_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
                * 1024,
                "num_processors": os.cpu_count(),
                "packages": {n: version(n) for n in ("tokenizers", "transformers", "pyarrow")},
            }
            print(json.dumps(found), flush=True)
            print(f"{found['peak_resident_bytes'] / MIB:.0f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
