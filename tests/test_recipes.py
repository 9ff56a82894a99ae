"""Every recipe in the house can be read by its script."""

import importlib
from pathlib import Path

import pytest

from prunelle.cli import COMMANDS, parse
from prunelle.stages import read_stages

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(file for file in RECIPES.rglob("*.yaml") if file.parent.name != "accelerate")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RECIPES)))
def test_a_recipe_has_only_flags_that_its_script_knows(file: Path) -> None:
    """Prevents a renamed flag from breaking a recipe that no test runs."""
    (command,) = [name for name in COMMANDS if f"scripts/{name}.py" in file.read_text()]
    if command == "run":
        assert len(read_stages(file)) > 1
        return
    *_, recipe = parse(["--config", str(file)], *importlib.import_module(f"prunelle.scripts.{command}").ARGUMENTS)
    assert recipe["output_dir"]
