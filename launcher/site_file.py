"""The site file: what every job of a cluster asks Slurm for, and constants measured there."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from launcher.errors import RecipeError, RunDirError, did_you_mean, list_problems
from launcher.hardware import SiteConstants, gpu_names
from launcher.predict.site_constants import NAMES
from launcher.recipe import merge_strictly
from launcher.recipe_sections import SlurmSection
from launcher.recipe_text import read_yaml
from launcher.run_dir import read_text, write_text

_CALIBRATION_NOTE = "# Written by `zerofit calibrate`; to be rid of it, remove the section.\n"
# From its note or its key to the next line that begins with something else than space.
_CALIBRATION_BLOCK = re.compile(
    rf"(?:^{re.escape(_CALIBRATION_NOTE.rstrip())}\n)?"
    r"^calibration:.*\n?(?:^(?:[ \t].*)?(?:\n|\Z))*",
    re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True)
class GpuCalibration:
    """Physical constants that were fitted to the site's own runs on one kind of GPU."""

    num_runs: int = 0
    fitted_at: str = ""
    constants: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site file; ``slurm`` has the keys of a recipe's section of that name."""

    slurm: SlurmSection = field(default_factory=SlurmSection)
    calibration: dict[str, GpuCalibration] = field(default_factory=dict)
    """By the GPU's name; written by ``zerofit calibrate``."""


def site_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the site file is looked for: ``$XDG_CONFIG_HOME/zerofit/site.yaml``.

    Source: XDG Base Directory Specification 0.8: unset or relative means ``~/.config``.
    """
    configured = Path(environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    base = configured if configured.is_absolute() else Path("~/.config").expanduser()
    return base / "zerofit" / "site.yaml"


def read_site(path: Path) -> SlurmSection:
    """Return the site's Slurm settings; without the file, none.

    Raises:
        RecipeError: an unknown key, or a value that cannot be used.
        RunDirError: the file is there and cannot be read.
    """
    return parse_site(read_text(path), source=str(path)).slurm if path.exists() else SlurmSection()


def read_constants(path: Path, gpu_name: str) -> SiteConstants | None:
    """Return what the site has measured on a kind of GPU; ``None`` where it has not.

    Raises:
        RecipeError, RunDirError: as :func:`read_site`.
    """
    if not path.exists():
        return None
    found = parse_site(read_text(path), source=str(path)).calibration.get(gpu_name)
    if found is None or not found.constants:
        return None
    values = tuple(sorted(found.constants.items()))
    return SiteConstants(values=values, num_runs=found.num_runs, fitted_at=found.fitted_at)


def write_constants(path: Path, gpu_name: str, constants: SiteConstants) -> None:
    """Put constants of a kind of GPU into the site file; the rest of it stays, comments too.

    Raises:
        RecipeError, RunDirError: the file that is there cannot be read, or not be replaced.
    """
    import yaml

    text = read_text(path) if path.exists() else ""
    known = parse_site(text, source=str(path)).calibration
    mine = GpuCalibration(
        num_runs=constants.num_runs, fitted_at=constants.fitted_at, constants=dict(constants.values)
    )
    content = {name: asdict(item) for name, item in {**known, gpu_name: mine}.items()}
    block = yaml.safe_dump({"calibration": content}, sort_keys=False)
    rest = _CALIBRATION_BLOCK.sub("", text).rstrip("\n")
    new_text = f"{rest}\n{_CALIBRATION_NOTE}{block}".lstrip("\n")
    parse_site(new_text, source=str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, new_text)
    except OSError as error:
        raise RunDirError(
            f"the site file cannot be written: {error.strerror}",
            where=str(path),
            fix="ask for the permission, or set XDG_CONFIG_HOME to a folder of yours",
        ) from None


def parse_site(text: str, *, source: str) -> Site:
    """Parse a site file as strictly as a recipe.

    Raises:
        RecipeError: all that is wrong, each with its key.
    """
    from omegaconf import OmegaConf

    tree = merge_strictly(Site, [(source, read_yaml(text, source, kind=Site))], source=source)
    site = OmegaConf.to_object(tree)
    assert isinstance(site, Site)
    _check_calibration(site, source)
    return site


def _check_calibration(site: Site, source: str) -> None:
    problems = []
    for gpu_name, found in site.calibration.items():
        if gpu_name not in gpu_names():
            problems.append(f"calibration.{gpu_name}: {did_you_mean(gpu_name, gpu_names())}")
        for name, value in found.constants.items():
            where = f"calibration.{gpu_name}.constants.{name}"
            if name not in NAMES:
                problems.append(f"{where} is unknown: {did_you_mean(name, NAMES)}")
            elif not 0 < value < math.inf:
                problems.append(f"{where} is {value}, which is no size, time or share")
    if problems:
        raise RecipeError(
            list_problems(problems), where=source, fix="run `zerofit calibrate` again"
        )


def with_site(recipe: SlurmSection, site: SlurmSection) -> SlurmSection:
    """Return a recipe's settings, with the site's where the recipe says nothing."""

    def is_said(value: object) -> bool:
        return bool(value) if isinstance(value, list | tuple) else value is not None

    unsaid = {
        item.name: getattr(site, item.name)
        for item in fields(recipe)
        if not is_said(getattr(recipe, item.name))
    }
    return replace(recipe, **unsaid)
