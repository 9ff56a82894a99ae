"""Weights that stay as they are while the rest of the model trains."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import TEACHER_CONFIG, flags
from torch import Tensor

from prunelle.cli import main


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def stayed(new: dict[str, Tensor], old: dict[str, Tensor]) -> set[str]:
    return {name for name in new if torch.equal(new[name], old[name])}


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_embeddings_stay_and_all_else_is_trained(
    reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path, checkpointing: str
) -> None:
    """Prevents a flag that freezes nothing, and layers that get no gradient since what goes into them has none."""
    words = ["--teacher_name_or_path", teacher, "--student_layers", "0,1,2,3", *flags(reviews), *short_run]
    words += ["--frozen_modules", "*embeddings", "--activation_checkpointing", checkpointing]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "student")]) == 0
    new = weights(tmp_path / "student")
    assert stayed(new, weights(teacher)) == {name for name in new if "embeddings" in name}


def test_the_teacher_is_trained_whole(
    reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path
) -> None:
    """Prevents a teacher from scratch whose embeddings are noise for ever since the student's are not to move."""
    words = ["--teacher_config", json.dumps(TEACHER_CONFIG), "--finetune_teacher", *flags(reviews), *short_run]
    words += ["--student_layers", "0,1", "--frozen_modules", "bert.embeddings", "bert.encoder.layer.1"]
    for name, more in {"once": "1", "twice": "2"}.items():
        epochs = ["--teacher_num_train_epochs", more, "--teacher_output_dir", str(tmp_path / f"teacher-{name}")]
        assert main(["distill", *words, *epochs, "--output_dir", str(tmp_path / name)]) == 0
    old, new = weights(tmp_path / "teacher-once"), weights(tmp_path / "teacher-twice")
    assert stayed(old, new) <= {"bert.embeddings.position_ids"}
    assert "bert.encoder.layer.1.output.dense.weight" in stayed(weights(tmp_path / "once"), old)


def test_masks_are_learned_over_weights_that_stay(
    reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path
) -> None:
    """Prevents scores without a gradient where the weights that they mask have none."""
    words = ["--model_name_or_path", teacher, *flags(reviews), *short_run, "--score", "movement", "--density", "0.5"]
    words += ["--frozen_modules", "*encoder", "--max_steps", "20", "--output_dir", str(tmp_path / "pruned")]
    assert main(["prune", *words]) == 0
    old, new = weights(teacher), weights(tmp_path / "pruned")
    name = "bert.encoder.layer.0.output.dense.weight"
    kept = new[name] != 0
    assert abs(kept.float().mean() - 0.5) < 1e-3
    assert torch.equal(new[name][kept], old[name][kept])
    assert not torch.equal(kept, old[name].abs() >= old[name].abs().median())


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("encoder", "error: the pattern encoder matches none of the"),
        ("*", "error: --frozen_modules * leaves nothing to train"),
    ],
)
def test_patterns_that_cannot_be_meant(
    reviews: dict[str, str], short_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    pattern: str, complaint: str,
) -> None:  # fmt: skip
    """Prevents a typo by which nothing is frozen, found out after the teacher has been trained, or never."""
    words = ["--teacher_config", json.dumps(TEACHER_CONFIG), "--finetune_teacher", *flags(reviews), *short_run]
    words += ["--student_layers", "0,1", "--frozen_modules", pattern, "--output_dir", str(tmp_path / "student")]
    assert main(["distill", *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.glob("student*"))
