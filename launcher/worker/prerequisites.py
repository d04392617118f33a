"""What a plan needs beside the training stack: optional packages, and a drive to offload to."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from launcher.errors import SetupError
from launcher.strategy import Attention, Loss, Method, Offload, Strategy, needs_bitsandbytes


def leave_out_bitsandbytes() -> None:
    """Let bitsandbytes count as not installed in this process, which does not need it.

    PEFT imports it wherever it is installed, and with it torch's compiler: 1.0 s of a processor and
    40 MiB of each rank. To be called before PEFT is imported.

    Source: https://docs.python.org/3/reference/import.html#the-module-cache: None there means that
    there is no such module.
    """
    if "peft" not in sys.modules:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]


def check_packages(method: Method, strategy: Strategy) -> None:
    """Raise SetupError when an optional package that the plan needs is missing or broken."""
    needed = (
        ("flash_attn", "flash", strategy.attention is Attention.flash_attention_2),
        ("bitsandbytes", "qlora", needs_bitsandbytes(method, strategy)),
        ("liger_kernel", "liger", strategy.loss is Loss.liger or strategy.liger_kernels),
    )
    for package, extra, is_needed in needed:
        if is_needed:
            _import(package, extra)


def _import(package: str, extra: str) -> None:
    where = "this machine's Python environment"
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise SetupError(
            f"the plan needs the package {package}, which is not installed",
            where=where,
            fix=f"pip install 'zerofit[{extra}]', or choose another setting in the recipe",
        ) from error
    except (ImportError, OSError) as error:
        # What a library that was compiled for another torch ends in: "undefined symbol".
        raise SetupError(
            f"the plan needs the package {package}, which cannot be imported: {error}",
            where=where,
            fix=f"install a {package} that was built for this torch and CUDA, or choose another "
            "setting in the recipe",
        ) from error


def check_nvme(nvme_path: str | None, strategy: Strategy) -> None:
    """Raise SetupError when states shall go to NVMe and this host cannot do that.

    DeepSpeed builds its ``async_io`` operator on libaio; without it, it ends in a traceback
    about a compiler.
    """
    if Offload.nvme not in (strategy.offload_optimizer, strategy.offload_param):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise SetupError(
            "offload to NVMe needs libaio, which is not installed",
            where="this host",
            fix="apt-get install libaio-dev (or libaio-devel), or offload to cpu",
        )
    assert nvme_path is not None  # the recipe's check
    try:
        Path(nvme_path).mkdir(parents=True, exist_ok=True)
        probe = Path(nvme_path) / ".zerofit-probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise SetupError(
            f"cannot write there: {error.strerror}",
            where=f"strategy.nvme_path = {nvme_path}",
            fix="name a folder on a local NVMe drive that every rank may write",
        ) from error
