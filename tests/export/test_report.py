import json
import math

import pytest

from prunelle.compression.record import versions
from prunelle.export import Latency, ModelReport, Report, hardware


def row(name, milliseconds, **changes):
    values = {
        "name": name,
        "format": "torch",
        "metrics": {"accuracy": 0.5, "loss": 0.7},
        "size_bytes": 2_000_000,
        "parameters": 500_000,
        "latency_ms": {"1x32": Latency((milliseconds,) * 90 + (milliseconds + 1,) * 10)},
        "speedup": {"1x32": 8 / milliseconds},
        "flips": 3,
        "total": 1821,
        "max_abs_logit_difference": 0.25,
    }
    return ModelReport(**{**values, **changes})


@pytest.fixture
def report():
    broken = row("onnx", 2.0, metrics={"accuracy": 0.5, "loss": math.nan}, max_abs_logit_difference=math.inf)
    return Report("student", [row("student", 8.0), broken], hardware(), versions(), ["something is wrong."])


def test_json_has_the_agreed_form_and_is_strict(report, tmp_path):
    """NaN is not JSON: Python writes it and reads it back, and every other reader fails."""
    report.save(tmp_path)

    def reject(constant):
        raise ValueError(constant)

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=reject)
    assert list(content) == ["reference", "models", "hardware", "versions"]
    assert content["reference"] == "student"
    assert content["models"][0] == {
        "name": "student",
        "format": "torch",
        "metrics": {"accuracy": 0.5, "loss": 0.7},
        "size_bytes": 2_000_000,
        "parameters": 500_000,
        "latency_ms": {"1x32": {"p50": 8.0, "p95": 9.0, "p99": 9.0}},
        "speedup": {"1x32": 1.0},
        "flips": {"count": 3, "total": 1821},
        "max_abs_logit_difference": 0.25,
    }
    assert content["models"][1]["metrics"]["loss"] is None
    assert content["models"][1]["max_abs_logit_difference"] is None
    assert content["hardware"]["threads"] >= 1
    assert {"python", "torch", "onnxruntime"} <= set(content["versions"])


def test_the_table_shows_every_figure_and_the_warnings(report, tmp_path):
    """A warning that stands in a file alone is not read."""
    report.save(tmp_path)
    for table in (report.to_text(), (tmp_path / "report.md").read_text()):
        for figure in (
            "accuracy",
            "0.5000",
            "2.0 / 3.0",
            "4.00x",
            "3 of 1,821",
            "0.50 M",
            "something is wrong.",
        ):
            assert figure in table
    widths = {len(line) for line in report.to_text().splitlines()[:2]}
    assert len(widths) == 1
