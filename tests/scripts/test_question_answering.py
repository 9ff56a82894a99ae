"""Questions, contexts and answers in, a verified int8 reader out."""

import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from prunelle.cli import main
from prunelle.export.footprint import Footprint
from prunelle.scripts import _closing
from prunelle.tasks.metrics import AnswerMatch, compute

PEOPLE, PLACES = ["ada", "grace hopper", "emmy", "sofia"], ["paris", "geneva", "addis ababa", "lima"]
FILLER = ["went", "to", "and", "saw", "the", "sea", "near", "a", "hill"]


def write_questions(path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Who or where? A context has one of either, and is sometimes longer than a window."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        names = {"who": draw.choice(PEOPLE), "where": draw.choice(PLACES)}
        words = [*draw.choices(FILLER, k=draw.randint(4, 20)), *names.values()]
        draw.shuffle(words)
        context, question = " ".join(words), draw.choice(list(names))
        answer = names[question]
        start = f" {context} ".index(f" {answer} ")
        rows.append({"context": context, "question": question, "answers": {"text": [answer], "answer_start": [start]}})
    path.write_text("\n".join(map(json.dumps, rows)))
    return rows


WINDOWS = ["--task", "question-answering", "--doc_stride", "8", "--max_answer_length", "3"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A reader distilled by the command line, with its teacher, and its test questions."""
    from tests.conftest import SHORT_RUN, TEACHER_CONFIG

    folder = tmp_path_factory.mktemp("reader")
    config = {**TEACHER_CONFIG, "initializer_range": 0.1}  # narrow layers want a wider start
    for seed, (split, count) in enumerate({"train": 256, "validation": 48}.items()):
        write_questions(folder / f"{split}.jsonl", count, seed)
    test = write_questions(folder / "test.jsonl", 40, 2)
    words = [f"--{split}_file={folder / split}.jsonl" for split in ("train", "validation", "test")]
    words += [*WINDOWS, "--teacher_config", json.dumps(config), "--finetune_teacher"]
    words += ["--student_layers", "0,3", "--output_dir", str(folder / "run"), *SHORT_RUN]
    words += ["--learning_rate", "3e-3", "--per_device_train_batch_size", "16", "--num_train_epochs", "3"]
    words += ["--teacher_num_train_epochs", "8"]
    assert main(["distill", *words]) == 0
    return folder / "run", test


def test_a_reader_is_distilled(student: tuple[Path, list[dict[str, Any]]]) -> None:
    """Prevents a table of figures that the published checkpoint does not reach when it is loaded and asked."""
    folder, rows = student
    report = json.loads((folder / "report.json").read_text())
    by_name = {model["name"]: model for model in report["models"]}
    assert by_name["teacher"]["metrics"]["exact_match"] > 0.9
    assert by_name["student"]["metrics"]["exact_match"] > 0.9
    assert by_name["onnx"]["flips"] == {"count": 0, "total": len(rows)}
    assert by_name["onnx-int8"]["metrics"]["f1"] > 0.8

    # One window, whole contexts: no span but the best counts, so that windows must find what one look finds.
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for row in rows:
        inputs = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        spans = inputs.pop("offset_mapping")[0].tolist()
        context = [token for token, part in enumerate(inputs.sequence_ids(0)) if part == 1]
        with torch.no_grad():
            outputs = model(**inputs)
        scores = {
            (first, last): float(outputs.start_logits[0, first] + outputs.end_logits[0, last])
            for first in context
            for last in context
            if first <= last < first + 3
        }
        first, last = max(scores, key=scores.__getitem__)
        texts.append(row["context"][spans[first][0] : spans[last][1]])
    alone = compute([AnswerMatch], texts, [row["answers"]["text"] for row in rows])
    assert alone["exact_match"] == pytest.approx(by_name["student"]["metrics"]["exact_match"], abs=0.06)


def test_both_ends_are_distilled(
    student: tuple[Path, list[dict[str, Any]]], tmp_path: Path, short_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a teacher whose view of the ends is not heard, and soft targets that a cache or an ensemble changes."""
    monkeypatch.setattr(_closing, "export_and_report", lambda *_, **__: Mock(to_text=str))
    monkeypatch.setattr(_closing, "write_card", Mock())
    folder, _ = student
    data = [f"--{split}_file={folder.parent / split}.jsonl" for split in ("train", "validation")]
    teacher = str(folder) + "-teacher"
    losses = []
    for name, words in {
        "once": ["--teacher_name_or_path", teacher],
        "cached": ["--teacher_name_or_path", teacher, "--teacher_cache", str(tmp_path / "cache")],
        "twice": ["--teacher_name_or_path", teacher, teacher],
    }.items():
        words = [*WINDOWS, *data, *words, "--student_layers", "0,3", "--hidden_cosine_weight", "0", *short_run]
        words += ["--hard_label_weight", "0", "--max_steps", "4", "--logging_steps", "1"]
        assert main(["distill", *words, "--output_dir", str(tmp_path / name)]) == 0
        record = json.loads((tmp_path / name / "compression.json").read_text())
        losses.append([step["loss_soft_target"] for step in record["training"] if "loss_soft_target" in step])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_readers_are_compared_exported_and_pruned(
    student: tuple[Path, list[dict[str, Any]]],
    tmp_path: Path,
    short_run: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prevents changed answers that are shown with another question, and a task that only distillation knows."""
    # Fresh processes, which other tests measure in, take seconds each.
    monkeypatch.setattr("prunelle.export.comparison.measure_footprint", lambda *_, **__: Footprint(0.0, 0))
    folder, rows = student
    words = [*WINDOWS, "--test_file", str(folder.parent / "test.jsonl"), "--max_seq_length", "24"]
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    model.qa_outputs.weight.data[[0, 1]] = model.qa_outputs.weight.data[[1, 0]]
    model.save_pretrained(tmp_path / "backwards")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "backwards")
    candidates = [str(folder / "onnx" / "model.onnx"), str(tmp_path / "backwards")]
    compared = ["--reference", str(folder), "--candidates", *candidates, "--shapes", "1x8", "--latency_seconds", "0.1"]
    assert main(["compare", *words, *compared, "--output_dir", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["models"][1]["flips"]["examples"] == []
    for flip in (changed := report["models"][2]["flips"]["examples"]):
        row = rows[flip["example"] - 1]
        assert flip["text"] == f"{row['question']} {row['context']}"
        assert flip["label"] == row["answers"]["text"][0]
        assert flip["candidate"] in row["context"] != flip["reference"]
    assert changed

    exported = ["--model_name_or_path", str(folder), "--variants", "fp32", "--output_dir", str(tmp_path / "files")]
    capsys.readouterr()
    assert main(["export", *words, *exported, "--latency_seconds", "0.1"]) == 0
    assert f"0 of {len(rows)}" in capsys.readouterr().out

    data = [f"--{split}_file={folder.parent / split}.jsonl" for split in ("train", "validation")]
    pruned = ["--model_name_or_path", str(folder), "--density", "0.5", "--max_steps", "10", *short_run]
    assert main(["prune", *WINDOWS, *data, *pruned, "--output_dir", str(tmp_path / "pruned")]) == 0
    weight = (
        AutoModelForQuestionAnswering.from_pretrained(tmp_path / "pruned").bert.encoder.layer[0].output.dense.weight
    )
    assert (weight == 0).float().mean() == 0.5
