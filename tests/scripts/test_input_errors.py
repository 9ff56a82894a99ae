"""Wrong input: one line on stderr, exit code 2, before anything is trained or written."""

import json
import re
from pathlib import Path

import pytest

from prunelle.cli import main


@pytest.fixture
def sound(reviews: dict[str, str], teacher: str, short_run: list[str], tmp_path: Path) -> dict[str, str]:
    """Flags of a run that would work; each test spoils one."""
    named = dict(zip(short_run[::2], short_run[1::2], strict=True))
    return {
        **reviews,
        **named,
        "--teacher_name_or_path": teacher,
        "--student_layers": "0,3",
        "--output_dir": str(tmp_path / "run"),
    }


def refused(words: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run is refused with."""
    capsys.readouterr()
    assert main(["distill", *(word for pair in words.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in error
    assert not Path(words["--output_dir"]).exists() or not list(Path(words["--output_dir"]).glob("*.safetensors"))
    return line


SPOILED = {
    "no such file": ({"--train_file": "nowhere.csv"}, r"no file nowhere\.csv"),
    "no such text column": ({"--text_column_name": "sentense"}, r"no column 'sentense' in .*nearest is 'sentence'"),
    "no such label column": ({"--label_column_name": "stars"}, r"no column 'stars' .*it has: sentence, label"),
    "unknown flag": ({"--student_layer": "0"}, r"unknown flag --student_layer; the nearest is --student_layers"),
    "no such recipe": ({"--config": "nowhere.yaml"}, r"no recipe nowhere\.yaml"),
    "no such teacher": ({"--teacher_name_or_path": "nowhere"}, r"no folder nowhere"),
    "a layer too many": ({"--student_layers": "0,4"}, r"4"),
    "layers that are no numbers": ({"--student_layers": "first"}, r"--student_layers first must be numbers"),
    "two students": ({"--student_name_or_path": "x"}, r"give the student in one way"),
    "a temperature of 0": ({"--temperature": "0"}, r"--temperature 0\.0 must be above 0"),
    "a negative weight": ({"--soft_target_weight": "-1"}, r"--soft_target_weight -1\.0 must not be negative"),
    "training of a trained teacher": (
        {"--teacher_learning_rate": "1e-3"},
        r"--teacher_learning_rate is for a teacher that is trained first: add --finetune_teacher",
    ),
    "too long for the model": ({"--max_seq_length": "512"}, r"--max_seq_length 512 is more than the 64 positions"),
    "a word for a number": ({"--num_train_epochs": "many"}, r"num_train_epochs.*'many'"),
    "an unknown task": ({"--task": "translation"}, r"--task.*'translation'"),
    "files and a data set": ({"--dataset_name": "builtin:docstrings"}, r"exclude each other"),
    "unlabeled text and no teacher": (
        {"--unlabeled_file": "more.csv", "--soft_target_weight": "0", "--hidden_cosine_weight": "0"},
        r"every weight except --hard_label_weight is 0",
    ),
    "unlabeled text and a loss on labels": (
        {"--unlabeled_file": "more.csv", "--soft_target_loss": "decoupled"},
        r"decoupled needs the label of every example",
    ),
    "unlabeled text where none is labelled": (
        {"--unlabeled_file": "more.csv", "--task": "masked-lm"},
        r"--unlabeled_file is for --task text-classification or token-classification, not masked-lm; .*--train_file",
    ),
    "no unlabeled file": ({"--unlabeled_file": "nowhere.csv"}, r"no file nowhere\.csv"),
    "nothing to resume": ({"--resume_from_checkpoint": "nowhere"}, r"no checkpoint folder nowhere"),
}


@pytest.mark.parametrize(("change", "expected"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_flag_is_named(
    sound: dict[str, str], change: dict[str, str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents hours of training on a typing error."""
    assert re.search(expected, refused(sound | change, capsys))


def test_an_unknown_recipe_key_is_named(
    sound: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a misspelt key from leaving its default in force, in silence."""
    (tmp_path / "recipe.yaml").write_text("learning_rat: 1.0e-4\n")
    line = refused(sound | {"--config": str(tmp_path / "recipe.yaml")}, capsys)
    assert "unknown key 'learning_rat'" in line
    assert "nearest is learning_rate" in line


SPOILED_FILES = {
    "a label that training never saw": ("sentence,label\na film,so-so\n", r"example 1: label 'so-so' .*bad, good"),
    "a header alone": ("sentence,label\n", r"is empty"),
    "nothing at all": ("", r"is empty"),
    "a missing label": ("sentence,label\na film,\n", r"example 1: column 'label' holds no label"),
    "a missing text": ("sentence,label\na film,good\n ,bad\n", r"example 2: column 'sentence' holds no text"),
    "other columns": ("words,label\na film,good\n", r"no column named text or sentence .*words, label"),
}


@pytest.mark.parametrize(("content", "expected"), SPOILED_FILES.values(), ids=SPOILED_FILES)
def test_a_spoiled_file_is_named(
    sound: dict[str, str], tmp_path: Path, content: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a label index that silently means another class, and metrics over nothing."""
    (tmp_path / "spoiled.csv").write_text(content)
    line = refused(sound | {"--validation_file": str(tmp_path / "spoiled.csv")}, capsys)
    assert "spoiled.csv" in line
    assert re.search(expected, line)


def test_a_run_is_never_overwritten(sound: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents yesterday's result from being lost to a command that was typed again."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text("{}")
    assert "already holds a run" in refused(sound, capsys)
    assert (tmp_path / "run" / "report.json").read_text() == "{}"


def test_vocabularies_that_differ_are_refused(sound: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents token ids that the teacher reads and the student cannot."""
    config = {"model_type": "bert", "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    del sound["--student_layers"]
    assert "vocabular" in refused(sound | {"--student_config": json.dumps(config)}, capsys)


def test_hidden_sizes_that_differ_are_refused(sound: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a shape error in the first step, after the teacher has been trained."""
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    del sound["--student_layers"]
    line = refused(sound | {"--student_config": json.dumps(config | {"max_position_embeddings": 64})}, capsys)
    assert "--hidden_cosine_weight 0" in line


def test_a_teacher_of_other_labels_is_refused(
    sound: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents the teacher's class 0 from being distilled into another class 0."""
    for split in ("train", "validation"):
        text = Path(sound[f"--{split}_file"]).read_text().replace(",good", ",positive").replace(",bad", ",negative")
        (tmp_path / f"{split}.csv").write_text(text)
        sound[f"--{split}_file"] = str(tmp_path / f"{split}.csv")
    del sound["--test_file"]
    assert re.search(r"predicts bad, good, but .* labelled negative, positive", refused(sound, capsys))


def test_a_bare_teacher_is_refused_unless_it_may_be_trained(
    sound: dict[str, str], teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents the distillation of a head that was drawn at random."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "bare")
    assert "add --finetune_teacher" in refused(sound | {"--teacher_name_or_path": str(tmp_path / "bare")}, capsys)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents a traceback where a word was misspelt."""
    assert main(["distil"]) == 2
    assert "the nearest is distill" in capsys.readouterr().err
