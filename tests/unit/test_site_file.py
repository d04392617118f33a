"""The site file: where it is, what it may hold, and that recipes win."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.recipe_sections import SlurmSection
from launcher.site_file import parse_site, read_site, site_path, with_site


def test_it_is_looked_for_where_xdg_says() -> None:
    assert site_path({"XDG_CONFIG_HOME": "/etc/xdg"}) == Path("/etc/xdg/zerofit/site.yaml")
    home = Path("~/.config/zerofit/site.yaml").expanduser()
    assert site_path({}) == home
    assert site_path({"XDG_CONFIG_HOME": "relative"}) == home


def test_without_a_file_nothing_is_set(tmp_path: Path) -> None:
    assert read_site(tmp_path / "site.yaml") == SlurmSection()


def test_a_recipe_wins_over_the_site_key_by_key() -> None:
    site = parse_site(
        "slurm: {account: proj42, partition: a100, requeue: false, modules: [cuda]}", source="s"
    )
    merged = with_site(SlurmSection(partition="h100", modules=("gcc",)), site)
    assert merged.account == "proj42"
    assert merged.partition == "h100"
    assert merged.requeue is False
    assert list(merged.modules) == ["gcc"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("slurm: {acount: x}", "did you mean 'account'"),
        ("partition: a100", "unknown key 'partition'"),
        ("slurm: {cpus_per_task: many}", "is not a whole number"),
        ("slurm: {container_runtime: docker}", "container_runtime"),
        ("slurm: a100", "is a section"),
        ("slurm: {", "not YAML"),
    ],
)
def test_a_mistake_is_an_error_that_names_the_file(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_site(text, source="/home/me/site.yaml")
    assert said in str(caught.value)
    assert "/home/me/site.yaml" in str(caught.value)
