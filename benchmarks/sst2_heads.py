"""Attention heads taken out of a fine-tuned SST-2 model without training: by importance and at random.

    python benchmarks/sst2_heads.py --data_dir data/sst2 --model runs/teacher \
        --results_file benchmarks/results/sst2_heads.json --picture docs/heads.svg

Importance (arXiv:1905.10650) ranks the heads of each layer, or all of the model's; at random is the mean of three
seeds. What is gone is taken out of the model, and latency is that of the smaller models' ONNX files, which take turns.
The last line is JSON: by way of choosing, for each share of heads that is gone, test accuracy in percent (and of the
random ones the standard deviation), and of those chosen layer by layer milliseconds at each shape. The picture needs
matplotlib.
"""

import argparse
import json
import logging
import statistics
import tempfile
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sst2 import TRAINING, Sentences
from transformers import PreTrainedModel

from prunelle.compression import bake
from prunelle.export import OnnxRunner, export_variants, measure_latency
from prunelle.trainers import FinetuningArguments, PruningArguments, PruningTrainer
from prunelle.trainers.finetuning import trainer_data

WAYS: dict[str, dict[str, Any]] = {
    "importance, by layer": {"score": "head_importance"},
    "importance, all heads": {"score": "head_importance", "ranking": "global"},
    "random": {"score": "random"},
}
SHAPES = ("1x32", "16x128")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="with train.csv, validation.csv and test.csv")
    parser.add_argument("--model", required=True, help="a fine-tuned checkpoint")
    parser.add_argument("--results_file", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--gone", type=int, nargs="+", default=list(range(0, 100, 10)), help="heads, in percent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration_samples", type=int, default=512)
    parser.add_argument("--latency_seconds", type=float, default=120.0)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    if options.picture and find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib, which is not installed: pip install matplotlib, or leave it out")

    sentences = Sentences(options.data_dir, options.model)
    results: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        runners = []
        for gone in options.gone:
            for way, flags in WAYS.items():
                found = []
                for seed in options.seeds if way == "random" else options.seeds[:1]:
                    model = without_heads(sentences, gone, seed, options.calibration_samples, flags)
                    found.append(sentences.accuracy(sentences.predict(model, "test"), "test"))
                results[way][str(gone)] = {"accuracy": round(statistics.mean(found), 2)}
                if len(found) > 1:
                    results[way][str(gone)]["deviation"] = round(statistics.stdev(found), 2)
                print(f"{gone} % gone, {way}: {results[way][str(gone)]}", flush=True)
                if way == "importance, by layer":
                    names = sentences.tokenizer.model_input_names
                    files = export_variants(model, f"{folder}/{gone}", ("fp32",), input_names=names)
                    runners.append(OnnxRunner(files["fp32"], str(gone), parameters=model.num_parameters()))
        latencies = measure_latency(
            runners,
            shapes=SHAPES,
            vocabulary=len(sentences.tokenizer),
            maximum_length=512,
            seconds=options.latency_seconds,
        )
    for gone, latency in zip(options.gone, latencies, strict=True):
        milliseconds = {shape: round(latency[shape].p50, 2) for shape in SHAPES}
        results["importance, by layer"][str(gone)]["milliseconds"] = milliseconds
    line = json.dumps(results)
    if options.results_file:
        options.results_file.write_text(line + "\n")
    if options.picture:
        draw(results, options.picture)
    print(line)


def without_heads(
    sentences: Sentences, gone: int, seed: int, calibration_samples: int, flags: dict[str, Any]
) -> PreTrainedModel:
    """A copy of the model that has lost so many percent of its heads, as `scripts/prune.py` does."""
    model = deepcopy(sentences.model)
    if not gone:
        return model
    if flags["score"] != "random":
        flags = flags | {"calibration_samples": calibration_samples}
    pruning = PruningArguments(structure=["heads"], density=[1 - gone / 100], schedule="one_shot", **flags)
    with tempfile.TemporaryDirectory() as folder:
        arguments = FinetuningArguments(output_dir=folder, num_train_epochs=0, seed=seed, **TRAINING)
        inputs = trainer_data(sentences.task, sentences.tokenizer, sentences.encoded)
        PruningTrainer(model, arguments, pruning, **inputs).train()
    bake(model)
    return pruning.compact(model)


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Accuracy and latency over the heads that are gone."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "heads"  # else every run writes other ids
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for way, by_gone in results.items():
        shares = [int(gone) for gone in by_gone]
        accuracies = [each["accuracy"] for each in by_gone.values()]
        deviations = [each.get("deviation", 0.0) for each in by_gone.values()]
        left.errorbar(shares, accuracies, deviations, marker="o", markersize=4, capsize=2, label=way)
    left.set(xlabel="heads gone, %", ylabel="test accuracy, %")
    left.legend()
    timed = results["importance, by layer"]
    for shape in SHAPES:
        milliseconds = [each["milliseconds"][shape] for each in timed.values()]
        relative = [each / milliseconds[0] for each in milliseconds]
        right.plot([int(gone) for gone in timed], relative, marker="o", markersize=4, label=shape)
    right.set(xlabel="heads gone, %", ylabel="latency of the ONNX file, all heads = 1", ylim=(0, 1.1))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
