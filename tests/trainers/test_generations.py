"""Self-distillation: each generation is taught by the last, and none is trained twice."""

import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from prunelle.cli import main
from prunelle.scripts import _closing
from prunelle.trainers import finetuning


@pytest.fixture
def closings(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """What runs are closed with, in place of an export."""
    mock = Mock(return_value=Mock(to_text=str))
    monkeypatch.setattr(_closing, "export_and_report", mock)
    monkeypatch.setattr(_closing, "write_card", Mock())
    return mock


@pytest.fixture
def words(reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path) -> list[str]:
    """Flags of a run of three generations of the teacher's own architecture, from scratch."""
    born_again = ["--teacher_name_or_path", teacher, "--student_config", teacher, "--generations", "3"]
    lengths = ["--num_train_epochs", "1", "--learning_rate", "3e-3", "--output_dir", str(tmp_path / "run")]
    return [*(word for pair in reviews.items() for word in pair), *short_run, *born_again, *lengths]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(other[name], weight) for name, weight in one.items())


def test_each_generation_is_taught_by_the_last(words: list[str], teacher: str, tmp_path: Path, closings: Mock) -> None:
    """Prevents generations that all learn from the first teacher, and copies that pass for born again."""
    assert main(["distill", *words]) == 0
    first, second = (Path(f"{tmp_path}/run-generation-{number}") for number in (1, 2))
    compared: Any = closings.call_args.kwargs["teacher"]
    assert equal(weights(second), dict(compared.state_dict()))
    assert closings.call_args.kwargs["teacher_folder"] == str(second)
    trained = [weights(folder) for folder in (Path(teacher), first, second, tmp_path / "run")]
    assert len({tuple((name, weight.shape) for name, weight in sorted(each.items())) for each in trained}) == 1
    assert not any(equal(trained[i], trained[j]) for i in range(4) for j in range(i))


def test_finished_generations_are_used_again(
    words: list[str],
    tmp_path: Path,
    closings: Mock,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents a run that was cut off from starting over, from ending elsewhere, or on generations of other flags; and
    one that was killed while it wrote a generation from taking it for a stranger's, or for whole."""
    assert main(["distill", *words]) == 0
    first, second, last = (Path(f"{tmp_path}/run{ending}") for ending in ("-generation-1", "-generation-2", ""))
    expected = weights(second), weights(last)
    written = (first / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(last)
    shutil.rmtree(second)
    killed = Mock(side_effect=lambda trainer, folder: (folder / "config.json").write_text("{}") and sys.exit())
    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "save_model", killed)
        with pytest.raises(SystemExit):
            main(["distill", *words])
    assert (second / "config.json").read_text() == "{}"
    assert main(["distill", *words]) == 0
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert equal(weights(second), expected[0])
    assert equal(weights(last), expected[1])

    shutil.rmtree(last)
    capsys.readouterr()
    assert main(["distill", *words, "--temperature", "3"]) == 2
    assert "run-generation-1 holds another model" in (error := capsys.readouterr().err)
    assert "give another --output_dir, or remove it" in error


SPOILED = {
    "no generation": (["--generations", "0"], "--generations 0 must be at least 1"),
    "layers": (["--student_layers", "0"], "give the student by --student_config"),
    "a cache": (["--teacher_cache", "c", "--hidden_cosine_weight", "0"], "keeps what one says"),
}


@pytest.mark.parametrize(("change", "expected"), SPOILED.values(), ids=SPOILED)
def test_what_generations_cannot_do_is_refused(
    words: list[str], change: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a generation of fewer layers than the one before, and answers of another teacher."""
    if change[0] == "--student_layers":
        del words[words.index("--student_config") : words.index("--student_config") + 2]
    assert main(["distill", *words, *change]) == 2
    assert expected in capsys.readouterr().err
