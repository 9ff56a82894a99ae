"""How far an exported file is from the simulation that a model is trained with, over a whole model and data set.

    python benchmarks/qat_fidelity.py --model_name_or_path runs/sst2/teacher --test_file data/sst2/test.csv

Rounding is chaotic: where two ways of adding end a hair apart, a number half way between two steps goes to the one or
to the other. So the floor is measured in the same run, by the same simulation in float32 and in float64. All three see
the same batches. The file has a column `sentence`; static ranges are calibrated on its first sentences, since only
agreement is measured. The last line is JSON: of each scheme and pair the mean difference of logits, and how many
predictions differ.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunelle.compression import bake
from prunelle.compression.quantization import Quantization
from prunelle.export import OnnxRunner, export_variants, load_checkpoint
from prunelle.export.variants import variant_of

Batch = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--test_file", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", default=["int8-dynamic", "int8-static", "int4-weight"])
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()

    with options.test_file.open(encoding="utf-8", newline="") as file:
        sentences = [row["sentence"] for row in csv.DictReader(file)]
    results = {}
    for scheme in options.schemes:
        checkpoint = load_checkpoint(options.model_name_or_path)
        batches = [
            dict(checkpoint.tokenizer(sentences[n : n + options.batch], padding=True, return_tensors="pt"))
            for n in range(0, len(sentences), options.batch)
        ]
        model = checkpoint.model
        method = Quantization(scheme)
        method.attach(model)
        method.calibrate(model, lambda samples, after_batch, m=model, b=batches: predict(m, b[:16]) is None)
        method.step(0.5)
        single, double = predict(model, batches), predict(model.double(), batches)
        model.float()
        plan = method.plan()
        bake(model)
        with tempfile.TemporaryDirectory() as folder:
            variant = variant_of(plan)
            path = export_variants(model, folder, (variant,), plan=plan)[variant]
            runner = OnnxRunner(path, variant, parameters=0)
            found = np.concatenate([runner({n: batch[n] for n in runner.input_names}) for batch in batches])
        results[scheme] = {
            "predictions": len(sentences),
            "float32, float64": compare(single, double),
            "file, float32": compare(found, single),
            "file, float64": compare(found, double),
        }
        print(scheme, results[scheme])
    print(json.dumps(results))


@torch.no_grad()
def predict(model: nn.Module, batches: list[Batch]) -> NDArray[np.float64]:
    """The logits: (examples, classes)."""
    return np.concatenate([model(**batch).logits.double().numpy() for batch in batches])


def compare(found: NDArray[np.float64], expected: NDArray[np.float64]) -> tuple[float, int]:
    """The mean difference of logits, and how many predictions differ."""
    return round(float(np.abs(found - expected).mean()), 4), int((found.argmax(-1) != expected.argmax(-1)).sum())


if __name__ == "__main__":
    main()
