"""The site file: what every job of a cluster asks Slurm for, so that recipes need not say it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from launcher.recipe import merge_strictly
from launcher.recipe_sections import SlurmSection
from launcher.recipe_text import read_yaml
from launcher.run_dir import read_text


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site file; its one section has the keys of a recipe's ``slurm``."""

    slurm: SlurmSection = field(default_factory=SlurmSection)


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
    return parse_site(read_text(path), source=str(path)) if path.exists() else SlurmSection()


def parse_site(text: str, *, source: str) -> SlurmSection:
    """Parse a site file as strictly as a recipe.

    Raises:
        RecipeError: all that is wrong, each with its key.
    """
    from omegaconf import OmegaConf

    tree = merge_strictly(Site, [(source, read_yaml(text, source, kind=Site))], source=source)
    site = OmegaConf.to_object(tree)
    assert isinstance(site, Site)
    return site.slurm


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
