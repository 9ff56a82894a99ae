"""A fine-tuned SST-2 model in few bits: quantized after training, trained for it on labels, and on its own predictions.

    python benchmarks/sst2_quantized.py --data_dir data/sst2 --model runs/teacher \
        --results_file benchmarks/results/sst2_quantized.jsonl

Everything is measured on the files, as they would be deployed, over the same batches; changed predictions are counted
against the model in float32. One JSON line a run is appended to the results file as the run ends, and runs that are in
it are not repeated. The last line is JSON: by scheme and way, means over the seeds; latencies, where they are asked
for by --latency_seconds, are those of this call's files, which take turns.
"""

import argparse
import itertools
import json
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from sst2 import TRAINING, Sentences, append, is_done, percentage, results
from torch.utils.data import DataLoader, Subset
from transformers import set_seed

from prunelle.compression import bake
from prunelle.export import OnnxRunner, export_variants, measure_latency
from prunelle.export.variants import variant_of
from prunelle.trainers import (
    CompressionTrainer,
    DistillationArguments,
    DistillationTrainer,
    FinetuningArguments,
    QuantizationArguments,
)
from prunelle.trainers.finetuning import trainer_data

# The model's own logits and hidden states in float32 are what a quantized one is to give.
ITS_OWN = {
    "soft_target_loss": "mse",
    "soft_target_weight": 1.0,
    "hard_label_weight": 0.0,
    "hidden_cosine_weight": 0.0,
    "hidden_mse_weight": 1.0,
}
SCHEMES: dict[str, dict[str, Any]] = {
    "int8-dynamic": {},
    "int8-static": {},
    "int8-static, learned ranges": {"scheme": "int8-static", "activation_ranges": "learned"},
    "int4-weight": {},
    "ternary": {},
    "binary": {},
}
WAYS = ("post-training", "labels", "distillation")
SHAPES = ("1x32", "16x128")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="with train.csv, validation.csv and test.csv")
    parser.add_argument("--model", required=True, help="a fine-tuned checkpoint")
    parser.add_argument("--results_file", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES)[:4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--embeddings", choices=["row", "tensor", "none"], default="row")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--calibration_samples", type=int, default=512, help="sentences that int8-static sees first")
    parser.add_argument("--loss", type=json.loads, help="terms of the distillation, in JSON, over those here")
    parser.add_argument("--no_dropout", action="store_true", help="train without it")
    parser.add_argument("--latency_seconds", type=float, default=0.0)
    options = parser.parse_args()
    logging.disable(logging.INFO)

    sentences = Sentences(options.data_dir, options.model)
    expected = sentences.predict(sentences.model, "test")
    shared = {name: getattr(options, name) for name in ("embeddings", "epochs", "learning_rate", "no_dropout", "loss")}
    shared["model"] = sentences.accuracy(expected, "test")
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        if options.latency_seconds:
            files["float32"] = export_variants(sentences.model, f"{folder}/float32", ("fp32",))["fp32"]
        for scheme, way, seed in itertools.product(options.schemes, options.ways, options.seeds):
            run = {"scheme": scheme, "way": way, "seed": seed, **shared}
            if scheme.startswith("int8-static"):
                run["calibration_samples"] = options.calibration_samples
            if way == "post-training":
                if seed != options.seeds[0]:
                    continue  # nothing in it depends on the seed
                run |= {"epochs": 0, "learning_rate": None}
            if is_done(run, options.results_file) and not options.latency_seconds:
                continue
            started = time.perf_counter()
            file = quantize(sentences, scheme, way, seed, f"{folder}/{scheme}-{way}-{seed}", options)
            for split in ("validation", "test"):
                predicted = predict(sentences, file, split)
                run[split] = sentences.accuracy(predicted, split)
            run["flips"] = int((predicted != expected).sum())
            run["agreement"] = percentage(predicted == expected)
            run["MB"] = round(file.stat().st_size / 1e6, 2)
            run["seconds"] = round(time.perf_counter() - started)
            append(run, options.results_file)
            files[f"{scheme}, {way}"] = file
        found = summary(results(options.results_file))
        if options.latency_seconds:
            found["milliseconds"] = latencies(files, len(sentences.tokenizer), options.latency_seconds)
    print(json.dumps(found))


def quantize(sentences: Sentences, scheme: str, way: str, seed: int, folder: str, options: argparse.Namespace) -> Path:
    """The file of a copy of the model."""
    set_seed(seed)
    model = deepcopy(sentences.model).requires_grad_()  # a trainer whose teacher it was has frozen it
    chosen = {"scheme": scheme, "embeddings": options.embeddings, **SCHEMES[scheme]}
    method = QuantizationArguments(**chosen, quantization_samples=options.calibration_samples).method()
    common: dict[str, Any] = {
        "output_dir": folder,
        "num_train_epochs": 0 if way == "post-training" else options.epochs,
        "learning_rate": options.learning_rate,
        "disable_dropout": options.no_dropout,
        "seed": seed,
        **TRAINING,
    }
    inputs = trainer_data(sentences.task, sentences.tokenizer, sentences.encoded)
    if way == "distillation":
        arguments = DistillationArguments(**common, **(ITS_OWN | (options.loss or {})))
        DistillationTrainer(model, sentences.model, arguments, [method], [options.model], **inputs).train()
    else:
        CompressionTrainer(model, FinetuningArguments(**common), [method], **inputs).train()
    plan = method.plan()
    bake(model)
    variant = variant_of(plan)
    return export_variants(model, folder, (variant,), plan=plan)[variant]


def predict(sentences: Sentences, file: Path, split: str) -> torch.Tensor:
    """(rows,) the predicted classes; texts of like length share a batch."""
    runner = OnnxRunner(file, file.stem, parameters=0)
    rows = sentences.encoded[split]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    batches = DataLoader(Subset(rows, order), 64, collate_fn=sentences.collate)
    found = torch.empty(len(rows), dtype=torch.long)
    found[order] = torch.cat([torch.from_numpy(runner(batch)).argmax(-1) for batch in batches])
    return found


def latencies(files: dict[str, Path], vocabulary: int, seconds: float) -> dict[str, dict[str, float]]:
    """The median in milliseconds, by file and shape."""
    runners = [OnnxRunner(file, name, parameters=0) for name, file in files.items()]
    found = measure_latency(runners, shapes=SHAPES, vocabulary=vocabulary, maximum_length=512, seconds=seconds)
    return {
        name: {shape: round(latency[shape].p50, 2) for shape in SHAPES}
        for name, latency in zip(files, found, strict=True)
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the seeds of test accuracy and changed predictions, with the number of seeds."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        dropout = ", no dropout" if run["no_dropout"] and run["epochs"] else ""
        settings = f"{run['epochs']} epochs {run['learning_rate']}{dropout}, embeddings {run['embeddings']}"
        if "calibration_samples" in run:
            settings += f", {run['calibration_samples']} samples"
        found[f"{run['scheme']}, {run['way']}, {settings}, model {run['model']}"].append(run)
    return {
        name: {
            "test": round(statistics.mean(run["test"] for run in alike), 2),
            "flips": round(statistics.mean(run["flips"] for run in alike), 1),
            "MB": alike[0]["MB"],
            "seeds": len(alike),
        }
        for name, alike in found.items()
    }


if __name__ == "__main__":
    main()
