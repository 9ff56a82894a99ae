import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from prunelle.errors import InputError
from prunelle.export import Evaluation, Latency, ModelReport, Report, hardware
from prunelle.export.candidates import Candidate
from prunelle.export.comparison import ComparedModel, Comparison, class_order, confusion_matrix, judge, verdict
from prunelle.export.comparison_report import save, to_html, to_text
from prunelle.export.footprint import Footprint, measure_footprint
from prunelle.export.weights import Weights

EVIL = "<script>alert(1)</script>"


def evaluation(predictions, references, margins=None):
    margins = np.linspace(0.1, 0.9, len(references)) if margins is None else np.array(margins)
    predicted, true = np.array(predictions), np.array(references)
    return Evaluation({"accuracy": 0.5}, 0, len(true), 0.0, predicted, margins, true, (predicted != true).astype(float))


def test_a_candidate_is_judged_by_hand():
    """Flips for the worse and for the better cancel out in the accuracy, and hide there."""
    true = [0, 0, 1, 1, 2, 2]
    before = evaluation([0, 0, 1, 0, 2, 0], true, [0.2, 0.9, 0.5, 0.6, 0.3, 0.4])
    after = evaluation([0, 1, 1, 1, 2, 1], true)
    judged = judge(before, after, ["a", "b", "c"], "abc".__getitem__, "text {}".format)
    assert (judged.worse, judged.better, judged.agreement, judged.p_value) == (1, 1, 0.5, 1.0)
    assert [(flip.example, flip.text, flip.label, flip.reference, flip.candidate) for flip in judged.flips] == [
        (2, "text 1", "a", "a", "b"),
        (4, "text 3", "b", "a", "b"),
        (6, "text 5", "c", "a", "b"),
    ]
    assert [flip.reference_margin for flip in judged.flips] == [0.9, 0.6, 0.4]
    changes = [(each.name, each.examples, each.reference_right, each.right) for each in judged.classes]
    assert changes == [("a", 2, 2, 1), ("b", 2, 1, 2), ("c", 2, 1, 1)]
    assert confusion_matrix(after, 3).tolist() == [[1, 1, 0], [0, 2, 0], [0, 1, 1]]


def test_verdicts():
    """ "Do not differ" must be said where it is so, and only there."""
    assert verdict(0, 1821, 0, 0, 1.0) == "none of 1,821 predictions changed"
    assert verdict(15, 1821, 9, 6, 0.6072) == (
        "15 of 1,821 predictions changed, 9 for the worse and 6 for the better; "
        "the accuracies do not differ at 5 % (McNemar p = 0.61)"
    )
    assert "the accuracies differ at 5 %: the candidate's is lower (McNemar p = 0.0021)" in verdict(9, 9, 9, 0, 0.0021)
    assert "the candidate's is higher" in verdict(9, 9, 0, 9, 0.0021)


def labels(*names):
    return SimpleNamespace(id2label=dict(enumerate(names)))


def test_classes_are_matched_by_name():
    """The same two classes in the other order would make every prediction a flip, or hide every one."""
    assert class_order(labels("neg", "pos"), labels("NEG", "Pos"), "m") is None
    assert class_order(labels("a", "b", "c"), labels("C", "A", "B"), "m") == [1, 2, 0]
    assert class_order(labels("neg", "pos"), labels("LABEL_0", "LABEL_1"), "m") is None
    for other in (labels("neg", "neutral"), labels("neg", "pos", "x"), labels("LABEL_0", "LABEL_1", "LABEL_2")):
        with pytest.raises(InputError, match=r"m predicts .*they must be the same"):
            class_order(labels("neg", "pos"), other, "m")


@pytest.fixture
def comparison():
    """Two models, one of them broken, and text that is HTML wherever text can be."""
    true = [0, 1, 1]
    before, after = evaluation([0, 1, 0], true), evaluation([1, 1, 0], true)
    classes = [EVIL, "b|a](http://x)"]
    rows = [
        ModelReport(
            name=name,
            format="torch",
            metrics={"accuracy": 2 / 3, "loss": math.nan},
            size_bytes=size,
            parameters=10,
            latency_ms={"1x32": Latency(tuple(range(start, start + 100)))},
            speedup={"1x32": 1.0},
            flips=1,
            total=3,
            max_abs_logit_difference=0.5,
        )
        for name, size, start in (("ref", 4_000_000, 10), (f"student{EVIL}", 1_000_000, 1))
    ]
    density = {f"layer.{layer}.{EVIL}.weight": 0.25 for layer in (0, 1)}
    weights = Weights("torch", 9, 5_000_000, 10, 4)
    pruned = Weights("torch", 9, 5_000_000, 10, 4, density, kept_layers=[1])
    footprint = Footprint(0.5, 300_000_000)
    judged = judge(before, after, classes, classes.__getitem__, lambda index: f"{EVIL} is\n text | {index}")
    models = [
        ComparedModel(weights, footprint, confusion_matrix(before, 2), None),
        ComparedModel(pruned, footprint, confusion_matrix(after, 2), judged),
    ]
    report = Report("ref", rows, hardware(), {"python": "3"}, [f"beware of {EVIL}"])
    data = {"task": "text-classification", "source": f"{EVIL}.csv", "split": "test", "examples": 3, "fingerprint": "0"}
    return Comparison(report, models, data, classes, {"seed": 1})


def test_text_from_data_is_escaped_everywhere(comparison, tmp_path):
    """A sentence of the test set must not run in the browser of whoever opens the report."""
    save(comparison, tmp_path)
    assert "(McNemar p" in (tmp_path / "report.html").read_text()
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "<script" not in text
        assert text.count("&lt;script&gt;alert(1)") >= 6
    markdown = (tmp_path / "report.md").read_text()
    assert not re.search(r"(?<!\\)\]\(", markdown)  # a link
    (row,) = (line for line in markdown.splitlines() if line.startswith("| 1 |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 6  # a border of the table


def test_the_page_needs_nothing_else(comparison):
    """A page that fetches something shows something else tomorrow, or tells who reads it."""
    page = to_html(comparison)
    assert not [word for word in ("src=", "href=", "url(", "@import", "<link", "<script") if word in page]
    assert page.count("<svg") == 5
    assert '="nan' not in page


def test_the_json_extends_that_of_every_other_report(comparison, tmp_path):
    """Who reads report.json of a distillation must be able to read this one; and NaN is no JSON."""
    save(comparison, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    plain = comparison.report.to_dict()
    assert {key: content[key] for key in ("reference", "hardware", "versions")} == {
        key: plain[key] for key in ("reference", "hardware", "versions")
    }
    for row, expected in zip(content["models"], plain["models"], strict=True):
        examples = row["flips"].pop("examples", [])
        assert {key: row[key] for key in expected} == expected
    assert [flip["text"] for flip in examples] == [f"{EVIL} is\n text | 0"]
    row = content["models"][1]
    assert (row["compressed_bytes"], row["nonzero_parameters"], row["load_seconds"]) == (5_000_000, 4, 0.5)
    assert row["latency_ms"]["1x32"] == pytest.approx({"p50": 50.5, "p95": 95.05, "p99": 99.01})
    assert row["examples_per_second"] == {"1x32": pytest.approx(1000 / 50.5)}
    assert row["confusion"] == [[0, 1], [1, 1]]
    assert ["density" in model for model in content["models"]] == [False, True]
    assert row["against_reference"]["worse"] == 1
    assert "against_reference" not in content["models"][0]


def test_what_pruning_left_is_drawn_of_pruned_models_alone(comparison):
    """A layer that is gone, drawn with the density of its masks, would look like one that is there."""
    section = to_html(comparison).split("<h2>Density</h2>")[1].split("<h2>")[0]
    assert section.count("<svg") == 1
    assert [re.search("([^ >]*) %", part)[1] for part in section.split("<rect")[1:]] == ["0", "25"]


def test_the_terminal_shows_the_verdict(comparison):
    assert "1 of 3 predictions changed, 1 for the worse and 0 for the better" in to_text(comparison)


def test_memory_is_of_the_model_alone(classifier):
    """Linux hands the parent's peak on to its children: every small model would cost what the largest did."""
    ballast = bytearray(1 << 30)
    ballast[::4096] = b"x" * len(ballast[::4096])
    footprint = measure_footprint(
        Candidate("tiny", "onnx", str(classifier.file)),
        AutoModelForSequenceClassification.__name__,
        shapes=["1x8"],
        vocabulary=300,
        maximum_length=48,
    )
    assert 0 < footprint.peak_memory_bytes < 1 << 28
    assert 0 < footprint.load_seconds < 30
