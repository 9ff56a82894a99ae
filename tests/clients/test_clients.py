"""The files of one export, run by those who will run them: each client a process of its own, without this project.

optimum needs an older transformers, transformers.js Node.js. Make each an environment, and say where:

    python -m venv optimum && optimum/bin/pip install "optimum-onnx[onnxruntime]"
    npm install --prefix js @huggingface/transformers
    PRUNELLE_OPTIMUM_PYTHON=optimum/bin/python PRUNELLE_TRANSFORMERS_JS=js pytest tests/clients
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

from prunelle.cli import main

HERE = Path(__file__).parent
FP32, INT8 = "model.onnx", "model_quantized.onnx"
DTYPES = {FP32: "fp32", INT8: "q8"}  # what transformers.js calls the files


@pytest.fixture(scope="module")
def texts(reviews: dict[str, str]) -> list[str]:
    with open(reviews["--test_file"], encoding="utf-8") as lines:
        return [row["sentence"] for row in csv.DictReader(lines)]


@pytest.fixture(scope="module")
def folder(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients") / "export"
    assert main(["export", "--model_name_or_path", teacher, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def expected(teacher: str, texts: list[str]) -> list[dict[str, Any]]:
    """What PyTorch predicts."""
    return pipeline("text-classification", model=teacher, device="cpu")(texts)


def asked(words: list[str], texts: list[str], **options: Any) -> list[dict[str, Any]]:
    done = subprocess.run(words, input=json.dumps(texts), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def onnxruntime(folder: Path, file: str, texts: list[str]) -> list[dict[str, Any]]:
    return asked([sys.executable, str(HERE / "onnxruntime_client.py"), str(folder), file], texts)


def optimum(folder: Path, file: str, texts: list[str]) -> list[dict[str, Any]]:
    python = os.environ.get("PRUNELLE_OPTIMUM_PYTHON")
    if python is None:
        pytest.skip("optimum is not installed: PRUNELLE_OPTIMUM_PYTHON names no interpreter")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return asked([python, str(HERE / "optimum_client.py"), str(folder), file], texts, env=clean)


def transformers_js(folder: Path, file: str, texts: list[str]) -> list[dict[str, Any]]:
    modules, node = os.environ.get("PRUNELLE_TRANSFORMERS_JS"), shutil.which("node")
    if modules is None or node is None:
        pytest.skip("transformers.js is not installed: PRUNELLE_TRANSFORMERS_JS names no folder, or there is no node")
    return asked([node, str(HERE / "transformers_js_client.mjs"), str(folder), DTYPES[file]], texts, cwd=modules)


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=tolerance)


@pytest.mark.parametrize("client", [onnxruntime, optimum, transformers_js])
def test_predictions_are_those_of_pytorch(
    client: Any, folder: Path, texts: list[str], expected: list[dict[str, Any]]
) -> None:
    """Prevents a folder that we alone can read: files under other names, another tokenization, labels lost."""
    assert {each["label"] for each in expected} == {"good", "bad"}
    same(client(folder, FP32, texts), expected, 1e-5)


@pytest.mark.parametrize("client", [optimum, transformers_js])
def test_the_int8_file_computes_the_same_everywhere(client: Any, folder: Path, texts: list[str]) -> None:
    """Prevents operators that one runtime rounds otherwise than the next."""
    same(client(folder, INT8, texts), onnxruntime(folder, INT8, texts), 1e-4)
