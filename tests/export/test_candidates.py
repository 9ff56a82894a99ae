import os

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from prunelle.errors import InputError
from prunelle.export.candidates import Candidate, find_candidates
from prunelle.export.latency import full_batch


@pytest.fixture
def runs(make_bert, classifier, tmp_path):
    """`a` holds a checkpoint and two ONNX files, `b` a checkpoint, `c` one ONNX file."""
    for name in "ab":
        make_bert().save_pretrained(tmp_path / name)
    for file in ("a/onnx/model.onnx", "a/onnx/model_quantized.onnx", "c/onnx/model.onnx"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        os.link(classifier.file, tmp_path / file)
    return tmp_path


def named(found):
    return {candidate.name: candidate.format for candidate in found}


def test_a_folder_stands_for_all_that_is_in_it(runs):
    """A model left out in silence is taken for one that was measured."""
    assert named(find_candidates(str(runs / "b"), [str(runs / "a"), str(runs / "c")])) == {
        "b": "torch",
        "a": "torch",
        "a/model.onnx": "onnx",
        "model_quantized.onnx": "onnx",
        "c/model.onnx": "onnx",
    }


def test_formats_choose(runs):
    a = str(runs / "a")
    assert named(find_candidates(a, [f"torch-bf16:{a}", f"torch-compile:{a}", f"onnx:{a}"])) == {
        "a": "torch",
        "a (torch-bf16)": "torch-bf16",
        "a (torch-compile)": "torch-compile",
        "model.onnx": "onnx",
        "model_quantized.onnx": "onnx",
    }


def test_an_onnx_file_finds_its_configuration_one_folder_up(runs):
    """Without it the classes of another model would be read in this one's order."""
    first, second = find_candidates(f"{runs}/a/onnx/model.onnx", [f"{runs}/c/onnx/model.onnx"])
    assert first.home == str(runs / "a")
    assert second.home is second.config() is second.tokenizer() is None


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        ("a", "nowhere.onnx", "no file nowhere.onnx"),
        ("a", "int4:b", "no format 'int4'; there is torch, torch-bf16"),
        ("a", "onnx:b", "b holds no onnx"),
        ("a", "torch-bf16:c/onnx/model.onnx", "cannot be run as torch-bf16"),
        ("a", "a/config.json", "neither a folder nor an ONNX file"),
        ("a", "empty", "holds neither a checkpoint nor onnx"),
        ("b", "b", "nothing to compare with b"),
        ("onnx:a", "b", "could be any of .*model.onnx.*model_quantized.onnx"),
    ],
)
def test_what_cannot_be_meant_is_named(runs, monkeypatch, reference, candidate, message):
    """A guess would be measured and reported under the name that was asked for."""
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        find_candidates(reference, [candidate])


def test_a_head_drawn_at_random_is_refused(make_bert, tmp_path):
    """Its report would be of coin tosses."""
    make_bert().bert.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no trained ForSequenceClassification: it lacks classifier"):
        Candidate("bare", "torch", str(tmp_path)).load(AutoModelForSequenceClassification)


def test_every_format_runs_in_what_it_says(runs, monkeypatch):
    """Under a wrong label the reference itself would be measured twice."""
    compiled = []

    def compile(module):
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    batch = full_batch(2, 9, 300)
    logits, types = {}, {}
    for format in ("torch", "torch-bf16", "torch-compile"):
        runner = Candidate("a", format, str(runs / "a")).load(AutoModelForSequenceClassification)
        logits[format], types[format] = runner(batch), runner.model.dtype
    assert types == {"torch": torch.float32, "torch-bf16": torch.bfloat16, "torch-compile": torch.float32}
    assert len(compiled) == 1
    assert (logits["torch"] == logits["torch-compile"]).all()
    assert 0 < abs(logits["torch"] - logits["torch-bf16"]).max() < 0.2
