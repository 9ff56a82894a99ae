"""The model card: metadata that the Hub understands, and instructions that work as they stand."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from prunelle.cli import main
from prunelle.compression.record import write_record
from prunelle.export import write_card
from prunelle.export.card import base_models
from prunelle.export.hub import upload


class Hub:
    """What of the Hub's API a push calls; keeps what was put there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "create_commit", self.create_commit)

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False, **_: Any) -> Any:
        assert exist_ok
        self.made.append((repo_id, private))
        full = repo_id if "/" in repo_id else f"somebody/{repo_id}"
        return type("RepoUrl", (), {"repo_id": full})()

    def create_commit(self, *, repo_id: str, operations: Sequence[CommitOperationAdd], **_: Any) -> None:
        for operation in operations:
            with operation.as_file() as stream:
                self.files[f"{repo_id}/{operation.path_in_repo}"] = stream.read()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


@pytest.fixture
def student(teacher: str, reviews: dict[str, str], short_run: list[str], tmp_path: Path, hub: Hub) -> Path:
    """A distilled, exported and pushed student, whose card is all that a reader has."""
    words = ["--teacher_name_or_path", teacher, "--student_layers", "0", "--max_steps", "2", *short_run]
    words += [word for pair in reviews.items() for word in pair]
    words += ["--push_to_hub", "true", "--hub_model_id", "somebody/small", "--save_strategy", "no"]
    assert main(["distill", *words, "--output_dir", str(tmp_path / "small")]) == 0
    return tmp_path / "small"


def code(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)


def test_a_pushed_student_speaks_for_itself(student: Path, hub: Hub, tmp_path: Path) -> None:
    """Prevents a push before the files are there, logs and checkpoints on the Hub, and instructions that do not run."""
    pushed = {name.removeprefix("somebody/small/") for name in hub.files}
    assert {"README.md", "config.json", "model.safetensors", "onnx/model_quantized.onnx", "compression.json"} <= pushed
    assert not [name for name in pushed if name.startswith(("runs/", "checkpoint-")) or name.endswith(".bin")]
    assert {name for name, _ in hub.made} == {"somebody/small"}

    card = ModelCard(hub.files["somebody/small/README.md"].decode())
    report = {row["name"]: row for row in json.loads((student / "report.json").read_text())["models"]}
    metadata = card.data.to_dict()
    assert metadata["pipeline_tag"] == "text-classification"
    assert metadata["library_name"] == "transformers"
    assert {"onnx", "distill"} <= set(metadata["tags"])
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == pytest.approx(report["student"]["metrics"])
    # What is whose on this machine is nobody's business: no file names a folder of it. The folder's own record does,
    # which other runs on it go by.
    assert not [name for name, content in hub.files.items() if str(tmp_path.parent).encode() in content]
    pushed_recipe = json.loads(hub.files["somebody/small/compression.json"])["recipe"]
    assert pushed_recipe["train_file"] == "train.csv"
    assert Path(json.loads((student / "compression.json").read_text())["recipe"]["train_file"]).is_absolute()

    # As a reader would: the repository's files in a folder of its name, and the code as it stands.
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "small").symlink_to(student)
    transformers, onnxruntime, _optimum = code(card.text, "python")
    assert "onnx/model_quantized.onnx" in onnxruntime
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([transformers, onnxruntime])], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    label = done.stdout.splitlines()[0]
    assert re.search("'label': '(good|bad)'", label), label
    assert 'dtype: "q8"' in code(card.text, "js")[0]


def test_what_only_this_machine_needs_stays_here(hub: Hub, tmp_path: Path) -> None:
    """Prevents half-written files and checkpoints on the Hub, in whatever folder they lie, and paths in any record."""
    for name in ("onnx/model.onnx", "onnx/.unfinished-1/model.onnx", "checkpoint-2/model.safetensors", "runs/log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    write_record(tmp_path / "peer-1", source={"recipe": {"peer_name_or_path": [str(tmp_path / "a"), "somebody/b"]}})
    upload(tmp_path, "somebody/small", SimpleNamespace(hub_token=None, hub_revision=None))
    assert set(hub.files) == {"somebody/small/onnx/model.onnx", "somebody/small/peer-1/compression.json"}
    pushed = json.loads(hub.files["somebody/small/peer-1/compression.json"])
    assert pushed["source"]["recipe"]["peer_name_or_path"] == ["a", "somebody/b"]


def test_a_push_that_cannot_be_is_refused_at_once(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents hours of training whose result cannot be put where it was to go."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error.\nInvalid username or password.")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    words = ["--model_name_or_path", teacher, "--output_dir", str(tmp_path / "onnx"), "--push_to_hub", "true"]
    assert main(["export", *words]) == 2
    assert capsys.readouterr().err == "error: --push_to_hub: there is no writing to onnx: 401 Client Error.\n"
    assert not (tmp_path / "onnx").exists()


def test_base_models_are_found_through_runs_on_this_machine(tmp_path: Path) -> None:
    """Prevents a card that names a folder of this machine, or no origin at all."""
    write_record(tmp_path / "teacher", recipe={"model_name_or_path": "google-bert/bert-base-uncased"})
    write_record(tmp_path / "student", recipe={"teacher_name_or_path": [str(tmp_path / "teacher")]})
    assert base_models({"model_name_or_path": str(tmp_path / "student")}) == ["google-bert/bert-base-uncased"]
    assert base_models({"teacher_config": "{}"}) == []
    assert base_models({"teacher_name_or_path": ["a/b", "c/d"], "student_name_or_path": "e/f"}) == ["e/f"]


@pytest.mark.parametrize(
    ("architecture", "pipeline", "clients"),
    [
        ("BertForMaskedLM", "fill-mask", ["AutoModelForMaskedLM", "ORTModelForMaskedLM", "run.tokenizer.mask_token"]),
        ("GPT2LMHeadModel", "text-generation", ["AutoModelForCausalLM", "onnxruntime.InferenceSession"]),
        ("T5ForConditionalGeneration", "text2text-generation", ["model.generate"]),
    ],
)
def test_other_tasks(architecture: str, pipeline: str, clients: list[str], tmp_path: Path) -> None:
    """Prevents a card that tells how to run another kind of model, or a client that cannot run this one."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (tmp_path / "model.safetensors").touch()
    if not architecture.startswith("T5"):
        (tmp_path / "onnx").mkdir()
        (tmp_path / "onnx" / "model.onnx").touch()
    write_record(tmp_path, methods=["prune"], recipe={"train_file": "/home/me/texts.csv"}, density={"a": 0.1, "b": 0.2})
    write_card(tmp_path, model_id="somebody/small")
    card = (tmp_path / "README.md").read_text()
    _, metadata, _ = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["pipeline_tag"] == pipeline
    assert "10.0% to 20.0% are kept" in card
    assert "train_file: texts.csv" in card
    for client in clients:
        assert client in card
    assert ("With optimum" in card) == architecture.startswith("Bert")
