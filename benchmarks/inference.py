"""How fast our files are, beside PyTorch and beside the int8 that other projects make, and what int8 changes.

    python benchmarks/inference.py --model_name_or_path runs/sst2/teacher --train_file data/sst2/train.csv \
        --test_file data/sst2/test.csv --optimum_python ~/optimum/bin/python --openvino_python ~/openvino/bin/python \
        --results_file benchmarks/results/inference.json

For the peers, `pip install optimum-onnx onnxruntime transformers==4.57.6` and `pip install openvino nncf transformers
torch` in an environment each; one whose interpreter is not given is left out. All models take turns in one run: the
peers in processes that wait while another computes. Median latencies by batch x tokens. Flips are test predictions
other than PyTorch's, of the same batches for all. Static int8 and NNCF are calibrated on the same training sentences.
`int8` is our static file.

The last line is JSON: {"torch": {"1x32": milliseconds, …}, "fp32": {…}, "int8": {…}, …, "flips": {"int8": n, …}}.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers

from prunelle.cli import run
from prunelle.compression.record import versions
from prunelle.errors import InputError
from prunelle.export import (
    OnnxRunner,
    Runner,
    TorchRunner,
    evaluate,
    export_variants,
    hardware,
    load_checkpoint,
    measure_latency,
)
from prunelle.export.arguments import ExportArguments, ExportDataArguments
from prunelle.export.data import calibration_of, examples_of, task_of
from prunelle.export.inference import INPUT_NAMES, deployed, maximum_length
from prunelle.export.runner import Batch, Logits

OURS = {"fp32": "fp32", "int8": "int8-static", "int8-dynamic": "int8-dynamic"}
SHAPES = ("1x32", "1x128", "16x128")
# How many times as fast the first is to be as the second.
FASTER = {
    ("fp32", "torch"): (1.7, 1.15, 1.0),
    ("int8", "torch"): (4.0, 2.6, 3.0),
    ("int8", "optimum-int8"): (1.1, 1.2, 1.2),
}
# The first's time over the second's is to be no more.
NO_SLOWER = {("int8", "openvino-int8"): (1.1, 1.2, 1.0)}
MAX_FLIPS = 0.01

Milliseconds = dict[str, dict[str, float]]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a BERT fine-tuned to classify texts")
    parser.add_argument("--train_file", required=True, help="whose sentences static int8 is calibrated on")
    parser.add_argument("--test_file", required=True)
    parser.add_argument("--max_eval_samples", type=int, help="of the test file")
    parser.add_argument("--optimum_python", help="the interpreter of an environment with optimum-onnx")
    parser.add_argument("--openvino_python", help="of one with openvino, nncf and transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to measure latency in all")
    parser.add_argument("--results_file", type=Path, help="everything is written here as JSON")
    options = parser.parse_args(argv)
    for python in (options.optimum_python, options.openvino_python):
        if python is not None and not os.access(python, os.X_OK):
            raise InputError(f"{python} is no interpreter")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = load_checkpoint(options.model_name_or_path)
        stack.enter_context(deployed(checkpoint.model))
        arguments = ExportArguments(options.model_name_or_path, str(folder), variants=list(OURS.values()))
        data = ExportDataArguments(
            train_file=options.train_file,
            validation_file=options.test_file,
            max_eval_samples=options.max_eval_samples,
        )
        data.max_seq_length = min(data.max_seq_length, maximum_length(checkpoint.model))
        task = task_of(checkpoint, data, arguments.seed)
        assert task is not None
        examples = examples_of(checkpoint, task, arguments)["validation"]
        calibration = calibration_of(checkpoint, task, arguments, data)
        files = export_variants(
            checkpoint.model,
            folder,
            arguments.variants,
            input_names=checkpoint.tokenizer.model_input_names,
            calibration=calibration,
        )
        runners: list[Runner] = [TorchRunner(checkpoint.model, "torch")]
        runners += [OnnxRunner(files[variant], name, parameters=0) for name, variant in OURS.items()]
        peers = [
            stack.enter_context(peer)
            for peer in peers_of(options, hardware()["int8_instructions"] != [], folder, calibration)
        ]
        runners += peers

        evaluations = evaluate(
            runners, examples.batches, task.compute_metrics, reference=runners[0], reader=examples.reader
        )
        latencies = measure_latency(
            runners,
            shapes=SHAPES,
            vocabulary=checkpoint.model.config.vocab_size,
            maximum_length=maximum_length(checkpoint.model),
            seconds=options.seconds,
        )
    names = [runner.name for runner in runners]
    times: Milliseconds = {
        name: {shape: round(latency.p50, 3) for shape, latency in found.items()}
        for name, found in zip(names, latencies, strict=True)
    }
    flips = {name: found.flips for name, found in zip(names, evaluations, strict=True) if name not in ("torch", "fp32")}
    print(table(times, flips, evaluations[0].total))
    result = {**times, "flips": flips}
    if options.results_file is not None:
        everything = {
            "command": shlex.join(["python", "benchmarks/inference.py", *argv]),
            "result": result,
            "p95": {
                name: {shape: round(latency.p95, 3) for shape, latency in found.items()}
                for name, found in zip(names, latencies, strict=True)
            },
            "predictions": evaluations[0].total,
            "metrics": {name: found.metrics for name, found in zip(names, evaluations, strict=True)},
            "versions": {"ours": versions(), **{peer.name: peer.versions for peer in peers}},
            "hardware": hardware(),
        }
        options.results_file.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


class Peer(Runner):
    """A model in a process of its own, which waits for its turns and takes its own time.

    Args:
        name: in the table.
        command: what to run, as `inference_peers.serve` answers.
        settings: what its maker is told.
    """

    format = "onnx-int8"
    size_bytes = parameters = 0
    input_names = ("input_ids", "attention_mask")

    def __init__(self, name: str, command: Sequence[str], settings: dict[str, Any]) -> None:
        self.name = name
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # not this project's packages
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=own
        )
        self.versions: dict[str, str] = self._ask(settings)["versions"]

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()  # closes the pipes

    def __call__(self, batch: Batch) -> Logits:
        return np.array(self._ask_about(batch, 0)["logits"], dtype=np.float32)

    def time_calls(self, batch: Batch, calls: int) -> list[float]:
        """As any runner's, but measured in the other process: what it takes to ask there does not count."""
        return self._ask_about(batch, calls)["milliseconds"]

    def _ask_about(self, batch: Batch, calls: int) -> dict[str, Any]:
        return self._ask({"batch": _lists(batch), "calls": calls})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            self.__exit__()
            raise InputError(f"{self.name} ended; what it said is above") from error


def peers_of(options: argparse.Namespace, has_int8: bool, folder: Path, calibration: Sequence[Batch]) -> list[Peer]:
    """Starts the processes of those whose interpreter is given, and says which are left out."""
    # optimum names its configurations after instructions. Where the CPU lacks those of the usual one, the other is
    # meant for it; the usual one then saturates, as its documentation says, but is what many files are made with.
    configurations = {"optimum-int8": "avx512_vnni" if has_int8 else "avx2"}
    if not has_int8:
        configurations["optimum-int8-vnni"] = "avx512_vnni"
    settings = {
        "checkpoint": str(options.model_name_or_path),
        "threads": options.threads,
        "calibration": [_lists(batch) for batch in calibration],
    }
    worker, peers = str(Path(__file__).with_name("inference_peers.py")), []
    if options.optimum_python is None:
        print("optimum-int8 is left out: give --optimum_python")
    else:
        for name, configuration in configurations.items():
            own = {"configuration": configuration, "folder": str(folder / name)}
            peers.append(Peer(name, [options.optimum_python, worker, "optimum"], {**settings, **own}))
    if options.openvino_python is None:
        print("openvino-int8 is left out: give --openvino_python")
    else:
        peers.append(Peer("openvino-int8", [options.openvino_python, worker, "openvino"], settings))
    return peers


def table(times: Milliseconds, flips: dict[str, int], total: int) -> str:
    """The milliseconds, the flips, and the ratios beside what they are to be."""
    shapes = list(times["torch"])
    lines = [f"{'milliseconds':32}" + "".join(f"{shape:>16}" for shape in shapes) + f"{'flips':>16}"]
    for name, row in times.items():
        changed = f"{flips[name]} of {total}" if name in flips else ""
        lines.append(f"{name:32}" + "".join(f"{row[shape]:16.2f}" for shape in shapes) + f"{changed:>16}")
    lines.append(f"{'ratio (target)':32}" + "".join(f"{shape:>16}" for shape in shapes))
    for (ours, theirs), targets in (FASTER | NO_SLOWER).items():
        if theirs not in times:
            continue
        faster = (ours, theirs) in FASTER
        cells = []
        for shape, target in zip(SHAPES, targets, strict=True):
            if shape not in shapes:  # cut to the model's length
                continue
            speedup = times[theirs][shape] / times[ours][shape]
            ratio = speedup if faster else 1 / speedup
            met = ratio >= target if faster else ratio <= target
            cells.append(f"{ratio:.2f} ({'>=' if faster else '<='} {target}) {' ' if met else '!'}")
        label = f"{ours} over {theirs}" if faster else f"{ours} time over {theirs}"
        lines.append(f"{label:32}" + "".join(f"{cell:>16}" for cell in cells))
    share = flips["int8"] / total
    met = " " if share <= MAX_FLIPS else "!"
    lines.append(f"{'int8 flips':32}{share:>8.2%} (<= {MAX_FLIPS:.0%}) {met}")
    return "\n".join([*lines, "! misses its target"])


def _lists(batch: Batch) -> dict[str, Any]:
    """All inputs, as JSON holds them; without types of tokens in the batch there is one type."""
    words = np.asarray(batch["input_ids"])
    return {name: np.asarray(batch.get(name, np.zeros_like(words))).tolist() for name in INPUT_NAMES}


if __name__ == "__main__":
    sys.exit(run(main))
