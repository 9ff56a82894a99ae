"""Models that other projects make int8, in a process of their own environment that answers and times on request.

It needs nothing of this project: `benchmarks/inference.py` starts it and speaks to it, a line of JSON at a time.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")

Settings = dict[str, Any]
Model = Callable[[dict[str, Any]], Any]  # (batch, length) int64 by name to (batch, classes)


def serve(make: Callable[[Settings], tuple[Model, dict[str, str]]]) -> None:
    """Makes a model, says so, and answers requests, one JSON line each, until there are no more.

    Args:
        make: from the settings on the first line to a model and the versions of what made it.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; what they print is no answer
    model, versions = make(json.loads(sys.stdin.readline()))
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        batch = {name: np.array(asked["batch"][name], dtype=np.int64) for name in INPUT_NAMES}
        logits, taken = model(batch), []
        for _ in range(asked["calls"]):  # as `Runner.time_calls` does
            start = time.perf_counter()
            model(batch)
            taken.append(1000 * (time.perf_counter() - start))
        print(json.dumps({"logits": np.asarray(logits).tolist(), "milliseconds": taken}), file=answers, flush=True)


def optimum(settings: Settings) -> tuple[Model, dict[str, str]]:
    """optimum-onnx's export, and its dynamic int8 by the configuration for the CPU, per channel."""
    import onnxruntime
    import transformers
    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig
    from optimum.version import __version__

    folder, model_class = settings["folder"], ORTModelForSequenceClassification
    model_class.from_pretrained(settings["checkpoint"], export=True).save_pretrained(folder)
    configuration = getattr(AutoQuantizationConfig, settings["configuration"])(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(folder).quantize(save_dir=folder, quantization_config=configuration)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as our runners: it would slow the next
    model = model_class.from_pretrained(folder, file_name="model_quantized.onnx", session_options=options)
    versions = {"optimum": __version__, "onnxruntime": onnxruntime.__version__}
    return lambda batch: model(**batch).logits, {**versions, "transformers": transformers.__version__}


def openvino(settings: Settings) -> tuple[Model, dict[str, str]]:
    """OpenVINO's conversion of the model, and NNCF's quantization after training, by its settings for transformers."""
    import nncf
    import openvino
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(settings["checkpoint"]).eval()
    example = {name: torch.ones(2, 8, dtype=torch.int64) for name in INPUT_NAMES}
    example["attention_mask"][1, 5:] = 0  # a mask of ones alone could be traced as none
    converted = openvino.convert_model(model, example_input=example)
    batches = [
        {name: np.array(batch[name], dtype=np.int64) for name in INPUT_NAMES} for batch in settings["calibration"]
    ]
    quantized = nncf.quantize(
        converted, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
    )
    tuned = {"INFERENCE_NUM_THREADS": settings["threads"], "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(quantized, "CPU", tuned)
    versions = {"openvino": openvino.__version__, "nncf": nncf.__version__, "transformers": transformers.__version__}
    return lambda batch: compiled(batch)[0], versions


MAKERS = {"optimum": optimum, "openvino": openvino}

if __name__ == "__main__":
    serve(MAKERS[sys.argv[1]])
