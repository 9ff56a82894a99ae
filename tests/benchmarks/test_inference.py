"""The harness of benchmarks/inference.py: our files on a tiny model, and peers that are none."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from prunelle.errors import InputError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BATCH = {name: np.array([[1, 2, 3], [4, 5, 6]]) for name in ("input_ids", "attention_mask", "token_type_ids")}

PEER = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from inference_peers import serve

def make(settings):
    print("what a library prints")
    def model(batch):
        print("on the way")
        time.sleep(0.02)
        return batch["input_ids"][:, :2] + settings["added"]
    return model, {{"peer": "1.0"}}

serve(make)
"""


@pytest.fixture(scope="module")
def inference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("inference", BENCHMARKS / "inference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_our_files_are_measured_without_peers(
    inference: ModuleType,
    teacher: str,
    reviews: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Prevents a row that is left out silently, and one file measured under two names."""
    words = ["--model_name_or_path", teacher, "--train_file", reviews["--train_file"]]
    words += ["--test_file", reviews["--test_file"], "--seconds", "0", "--threads", "1"]
    inference.main([*words, "--results_file", str(tmp_path / "results.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "left out" in line] == [
        "optimum-int8 is left out: give --optimum_python",
        "openvino-int8 is left out: give --openvino_python",
    ]
    result = json.loads(lines[-1])
    assert list(result) == ["torch", "fp32", "int8", "int8-dynamic", "flips"]
    assert all(set(result[name]) == {"1x32", "1x64", "16x64"} for name in inference.OURS)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["result"] == result
    assert kept["predictions"] == 48
    losses = {name: metrics["loss"] for name, metrics in kept["metrics"].items()}
    assert losses["fp32"] == pytest.approx(losses["torch"], abs=1e-5)
    assert len({losses[name] for name in ("torch", "int8", "int8-dynamic")}) == 3


def test_a_peer_answers_and_takes_its_own_time(inference: ModuleType, tmp_path: Path) -> None:
    """Prevents what asking costs from being counted against a peer, and prints of its libraries from being read."""
    (tmp_path / "peer.py").write_text(PEER)
    with inference.Peer("peer", [sys.executable, str(tmp_path / "peer.py")], {"added": 0.5}) as peer:
        assert peer.versions == {"peer": "1.0"}
        np.testing.assert_array_equal(peer(BATCH), [[1.5, 2.5], [4.5, 5.5]])
        taken = peer.time_calls(BATCH, 3)
    assert len(taken) == 3
    assert min(taken) >= 20  # milliseconds


def test_a_peer_that_fails_is_named(inference: ModuleType) -> None:
    """Prevents a run that waits for ever for a process that is gone."""
    with pytest.raises(InputError, match="peer ended"):
        inference.Peer("peer", [sys.executable, "-c", ""], {"long": "x" * 1_000_000})


def test_missed_targets_are_marked(inference: ModuleType) -> None:
    """Prevents a ratio taken the wrong way round, which would pass for one that is met."""
    shapes = inference.SHAPES
    times = {
        "torch": dict.fromkeys(shapes, 8.0),
        "fp32": dict.fromkeys(shapes, 4.0),
        "int8": dict(zip(shapes, (1.0, 2.0, 4.0), strict=True)),
        "openvino-int8": dict.fromkeys(shapes, 2.0),
    }
    text = inference.table(times, {"int8": 10, "openvino-int8": 0}, 1000)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "fp32 over torch 2.00 (>= 1.7) 2.00 (>= 1.15) 2.00 (>= 1.0)" in rows
    assert "int8 over torch 8.00 (>= 4.0) 4.00 (>= 2.6) 2.00 (>= 3.0) !" in rows
    assert "int8 time over openvino-int8 0.50 (<= 1.1) 1.00 (<= 1.2) 2.00 (<= 1.0) !" in rows
    assert "int8 flips 1.00% (<= 1%)" in rows
    assert "optimum" not in text
