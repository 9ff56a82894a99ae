"""Every recipe in the house can be read by its script."""

from pathlib import Path

import pytest

from prunelle.cli import parse
from prunelle.tasks import DataArguments, DistillationDataArguments
from prunelle.trainers import DistillationArguments, FinetuningArguments, PruningArguments, QuantizationArguments
from prunelle.trainers.models import ModelArguments, TeacherStudentArguments
from prunelle.trainers.pruning import PrunedModelArguments
from prunelle.trainers.quantization import QuantizedModelArguments

RECIPES = Path(__file__).parents[1] / "recipes"
FLAGS = {
    "distill": (DistillationDataArguments, TeacherStudentArguments, DistillationArguments),
    "prune": (DataArguments, PrunedModelArguments, DistillationArguments, PruningArguments),
    "qat": (DataArguments, QuantizedModelArguments, DistillationArguments, QuantizationArguments),
    "finetune": (DataArguments, ModelArguments, FinetuningArguments),
}
FILES = sorted(file for file in RECIPES.rglob("*.yaml") if file.parent.name != "accelerate")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RECIPES)))
def test_a_recipe_has_only_flags_that_its_script_knows(file: Path) -> None:
    """Prevents a renamed flag from breaking a recipe that no test runs."""
    (script,) = [name for name in FLAGS if f"scripts/{name}.py" in file.read_text()]
    _, _, arguments, *_ = parse(["--config", str(file)], *FLAGS[script])
    assert arguments.output_dir
