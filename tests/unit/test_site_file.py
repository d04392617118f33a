"""The site file: where it is, what it may hold, and that recipes win."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.errors import RecipeError
from launcher.hardware import SiteConstants
from launcher.recipe_sections import SlurmSection
from launcher.site_file import (
    parse_site,
    read_constants,
    read_site,
    site_path,
    with_site,
    write_constants,
)


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
    ).slurm
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
        ("calibration: {H100-80GB: {constants: {context_byte: 1}}}", "'context_bytes'"),
        ("calibration: {H100-80GB: {constants: {context_bytes: .nan}}}", "which is no size"),
        ("calibration: {H100-80GB: {runs: 5}}", "runs"),
        ("calibration: {H100-81GB: {num_runs: 5}}", "'H100-80GB'"),
        ("calibration: [1]", "is a section"),
        ("slurm: {", "not YAML"),
    ],
)
def test_a_mistake_is_an_error_that_names_the_file(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_site(text, source="/home/me/site.yaml")
    assert said in str(caught.value)
    assert "/home/me/site.yaml" in str(caught.value)


MEASURED = SiteConstants(values=(("context_bytes", 9e8),), num_runs=12, fitted_at="2026-11-23")


def test_constants_are_written_beside_what_the_file_has(tmp_path: Path) -> None:
    path = tmp_path / "zerofit" / "site.yaml"
    path.parent.mkdir()
    path.write_text("# our cluster\nslurm: {account: proj42}  # ask Ada\n")
    write_constants(path, "H100-80GB", MEASURED)
    again = SiteConstants(values=(("context_bytes", 8e8),), num_runs=20, fitted_at="2026-12-01")
    write_constants(path, "V100-32GB", MEASURED)
    write_constants(path, "H100-80GB", again)
    text = path.read_text()
    assert text.startswith("# our cluster\nslurm: {account: proj42}  # ask Ada\n")
    assert text.count("calibration:") == text.count("# Written by") == 1
    assert read_site(path).account == "proj42"
    assert read_constants(path, "H100-80GB") == again
    assert read_constants(path, "V100-32GB") == MEASURED
    assert read_constants(path, "A100-80GB") is None


def test_what_stands_below_the_constants_stays(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    write_constants(path, "H100-80GB", MEASURED)
    path.write_text(path.read_text() + "\n# and jobs\nslurm: {partition: a100}\n")
    write_constants(path, "V100-32GB", MEASURED)
    assert "# and jobs\nslurm: {partition: a100}\n" in path.read_text()
    assert read_constants(path, "H100-80GB") == MEASURED


def test_a_broken_site_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("slurm: {acount: x}\n")
    with pytest.raises(RecipeError, match="acount"):
        write_constants(path, "H100-80GB", MEASURED)
    assert path.read_text() == "slurm: {acount: x}\n"
