"""Recipes of several stages: checked whole before anything runs, and gone on with where they were cut off."""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prunelle.cli import main
from prunelle.compression.record import read_record
from prunelle.scripts import _closing
from prunelle.stages import read_stages
from prunelle.trainers import DistillationTrainer

CONFIG = {
    "model_type": "bert",
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def without_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_closing, "export_and_report", lambda *_, **__: Mock(to_text=str))
    monkeypatch.setattr(_closing, "write_card", Mock())


@pytest.fixture
def recipe(reviews: dict[str, str], short_run: list[str], tmp_path: Path) -> dict[str, Any]:
    """A teacher, and a student of its layers that keeps checkpoints."""
    shared = {flag.removeprefix("--"): file for flag, file in reviews.items()}
    shared |= {flag.removeprefix("--"): value for flag, value in zip(short_run[::2], short_run[1::2], strict=True)}
    teacher, student = str(tmp_path / "teacher"), str(tmp_path / "student")
    return {
        "shared": shared | {"max_steps": 4},
        "stages": [
            {"finetune": {"model_config": CONFIG, "output_dir": teacher}},
            {
                "distill": {
                    "teacher_name_or_path": teacher,
                    "student_layers": 0,
                    "save_strategy": "steps",
                    "save_steps": 2,
                    "max_steps": 8,
                    "output_dir": student,
                }
            },
        ],
    }


def run(recipe: dict[str, Any], tmp_path: Path) -> int:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return main(["run", str(tmp_path / "recipe.yaml")])


def error_of(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a recipe is refused with."""
    capsys.readouterr()
    assert run(recipe, tmp_path) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_stages_that_were_cut_off_go_on(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents paying twice for what is done, and a student that ends elsewhere for having been interrupted."""
    steps: list[int] = []
    training_step = DistillationTrainer.training_step

    def cut_off(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "training_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path)
    teacher = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns
    assert run(recipe, tmp_path) == 0
    assert steps == [0, 1, 2, 3, *range(2, 8)]
    assert (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    assert run(recipe, tmp_path) == 0
    assert len(steps) == 10

    student = recipe["stages"][1]["distill"]
    student["output_dir"] = str(tmp_path / "whole")
    assert run(recipe, tmp_path) == 0
    assert steps[10:] == list(range(8))
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "whole"))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    record = read_record(tmp_path / "whole")
    assert record is not None
    assert record["recipe"]["max_steps"] == 8


def test_what_stands_in_the_way_is_said_before_anything_runs(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents the last stage from failing hours later, and a result of an older teacher from passing for finished."""
    student = tmp_path / "student"
    student.mkdir()
    (student / "notes.txt").write_text("mine")
    assert f"stage 2 (distill): {student} holds another run" in error_of(recipe, tmp_path, capsys)
    assert not (tmp_path / "teacher").exists()
    (student / "notes.txt").unlink()

    done = read_stages(tmp_path / "recipe.yaml")[1].recipe
    (student / "compression.json").write_text(json.dumps({"recipe": {**done, "max_steps": 9}}))
    assert "holds another run" in error_of(recipe, tmp_path, capsys)
    (student / "compression.json").write_text(json.dumps({"recipe": done}))
    assert f"{student} is finished, and {tmp_path}/teacher of an earlier stage" in error_of(recipe, tmp_path, capsys)
    assert not (tmp_path / "teacher").exists()


SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "no stages": ({"shared": {}}, r"recipe\.yaml must be a mapping of `stages`"),
    "flags beside the stages": ({"stages": [], "seed": 1}, r"recipe\.yaml must be a mapping of `stages`"),
    "two commands in one": ({"stages": [{"distill": {}, "finetune": {}}]}, r"stage 1 must be one command"),
    "an unknown command": ({"stages": [{"distil": {}}]}, r"stage 1: no command 'distil'; the nearest is distill"),
    "a recipe in itself": ({"stages": [{"run": {}}]}, r"stage 1: no command 'run'"),
    "an unknown flag": (
        {"stages": [{"finetune": {"learning_rat": 1.0}}]},
        r"stage 1 \(finetune\): unknown flag --learning_rat; the nearest is --learning_rate",
    ),
    "no output folder": (
        {"stages": [{"finetune": {"model_name_or_path": "a", "train_file": "b.csv"}}]},
        r"stage 1 \(finetune\): no output folder",
    ),
}


@pytest.mark.parametrize(("spoiled", "expected"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_stage_is_named(
    spoiled: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a typing error in the last stage from being found when the others are done."""
    assert re.search(expected, error_of(spoiled, tmp_path, capsys))


def test_a_refusal_of_a_stage_names_it(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents an error that could be of any of the stages."""
    recipe["stages"][0]["finetune"]["train_file"] = "nowhere.csv"
    assert error_of(recipe, tmp_path, capsys).endswith("stage 1 (finetune): no file nowhere.csv")
