"""Words and tags in, a verified int8 tagger out."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from prunelle.cli import main
from prunelle.export.footprint import Footprint
from prunelle.tasks.metrics import EntityF1, compute

NAMES = {
    "PER": [["ada", "lovelace"], ["grace", "hopper"], ["emmy", "noether"], ["sofia"]],
    "LOC": [["paris"], ["geneva"], ["buenos", "aires"], ["addis", "ababa"]],
}
FILLER = ["went", "to", "and", "saw", "the", "sea", "near", "a", "hill"]


def write_sentences(path: Path, count: int, seed: int) -> list[dict[str, list[str]]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words: list[tuple[str, str]] = []
        for _ in range(draw.randint(2, 5)):
            kind = draw.choice(["PER", "LOC", ""])
            if kind:
                name = draw.choice(NAMES[kind])
                words += [(word, ("I-" if number else "B-") + kind) for number, word in enumerate(name)]
            words.append((draw.choice(FILLER), "O"))
        rows.append({"tokens": [word for word, _ in words], "ner_tags": [tag for _, tag in words]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return rows


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, list[str]]]]:
    """A tagger distilled by the command line, with its teacher, and its test sentences."""
    from tests.conftest import SHORT_RUN, TEACHER_CONFIG

    folder = tmp_path_factory.mktemp("tagger")
    for seed, (split, count) in enumerate({"train": 192, "validation": 48}.items()):
        write_sentences(folder / f"{split}.jsonl", count, seed)
    test = write_sentences(folder / "test.jsonl", 40, 2)
    words = [f"--{split}_file={folder / split}.jsonl" for split in ("train", "validation", "test")]
    words += ["--task", "token-classification", "--teacher_config", json.dumps(TEACHER_CONFIG), "--finetune_teacher"]
    words += ["--student_layers", "0,3", "--output_dir", str(folder / "run"), *SHORT_RUN]
    words += ["--learning_rate", "3e-3", "--per_device_train_batch_size", "16", "--num_train_epochs", "8"]
    assert main(["distill", *words]) == 0
    return folder / "run", test


def test_a_tagger_is_distilled(student: tuple[Path, list[dict[str, list[str]]]]) -> None:
    """Prevents a table of figures that the published checkpoint does not reach when it is loaded and asked."""
    folder, sentences = student
    report = json.loads((folder / "report.json").read_text())
    by_name = {model["name"]: model for model in report["models"]}
    assert by_name["teacher"]["metrics"]["f1"] > 0.9
    assert by_name["student"]["metrics"]["f1"] > 0.9
    assert by_name["onnx"]["flips"] == {"count": 0, "total": sum(len(row["tokens"]) for row in sentences)}
    assert by_name["onnx-int8"]["metrics"]["f1"] > 0.8

    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    predicted = []
    for row in sentences:
        inputs = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        words = inputs.word_ids()
        with torch.no_grad():
            classes = model(**inputs).logits[0].argmax(-1)
        predicted.append(
            [model.config.id2label[int(classes[words.index(number)])] for number in range(len(row["tokens"]))]
        )
    expected = compute([EntityF1], predicted, [row["ner_tags"] for row in sentences])
    assert {name: by_name["student"]["metrics"][name] for name in expected} == pytest.approx(expected)


def test_taggers_are_compared_and_exported(
    student: tuple[Path, list[dict[str, list[str]]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents changed tags that are shown with another sentence's words."""
    # Fresh processes, which other tests measure in, take seconds each.
    monkeypatch.setattr("prunelle.export.comparison.measure_footprint", lambda *_, **__: Footprint(0.0, 0))
    folder, sentences = student
    test_file = str(folder.parent / "test.jsonl")
    words = ["--test_file", test_file, "--max_seq_length", "24", "--latency_seconds", "0.1"]
    model = AutoModelForTokenClassification.from_pretrained(folder)
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(tmp_path / "stubborn")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "stubborn")
    candidates = [str(folder / "onnx" / "model.onnx"), str(tmp_path / "stubborn")]
    compared = ["--task", "token-classification", "--reference", str(folder), "--candidates", *candidates]
    assert main(["compare", *compared, *words, "--shapes", "1x8", "--output_dir", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["classes"] == ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"]
    asked = [(row["tokens"], tag) for row in sentences for tag in row["ner_tags"]]
    assert report["models"][1]["flips"]["examples"] == []
    for flip in (changed := report["models"][2]["flips"]["examples"]):
        tokens, tag = asked[flip["example"] - 1]
        assert flip["label"] == tag
        assert set(re.sub(r"\[\w+\]", " ", flip["text"]).split()) <= set(tokens)
    assert len(changed) > 20
    exported = ["--model_name_or_path", str(folder), "--variants", "fp32", "--output_dir", str(tmp_path / "files")]
    capsys.readouterr()
    assert main(["export", *exported, *words]) == 0
    assert "0 of" in capsys.readouterr().out
