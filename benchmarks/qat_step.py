"""What fake quantization costs: a training step with each scheme, as a multiple of the same dense step.

    OMP_NUM_THREADS=2 python benchmarks/qat_step.py
    OMP_NUM_THREADS=1 python benchmarks/qat_step.py --cpu_time
    python benchmarks/qat_step.py --device cuda --batch 128 --tokens 128

The model has the sizes of MiniLM-L6, with random weights. A step is all that repeats in training: forward, loss,
backward and fused AdamW. All linear modules and tables of embeddings are quantized; `-linear` leaves the tables out, as
torchao (`pip install torchao`) does, whose linear modules have int8 weights, symmetric per output, and int8 inputs,
asymmetric per token. The variants take turns, in another order every round; the last line is JSON: of each, the median
over the rounds of its time divided by that of the round's dense step.
"""

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from interleaved import ratios_to_dense
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from prunelle.compression.quantization import Quantization

SCHEMES: dict[str, dict[str, Any]] = {
    "int8-dynamic": {"scheme": "int8-dynamic"},
    "int8-dynamic-linear": {"scheme": "int8-dynamic", "embeddings": "none"},
    "int8-static": {"scheme": "int8-static"},
    "int8-static-learned": {"scheme": "int8-static", "ranges": "learned"},
    "int4-weight": {"scheme": "int4-weight"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu_time", action="store_true", help="the process's own time: for a machine with other work")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    dense = BertForSequenceClassification(config).to(options.device).train()
    tokens = torch.randint(1000, config.vocab_size, (options.batch, options.tokens), device=options.device)
    labels = torch.randint(2, (options.batch,), device=options.device)

    def step_of(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            model(input_ids=tokens, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {"dense": step_of(copy.deepcopy(dense))}
    for name, settings in SCHEMES.items():
        model, method = copy.deepcopy(dense), Quantization(**settings)
        method.attach(model)
        method.calibrate(model, lambda samples, after_batch, model=model: model(input_ids=tokens) and None)
        method.step(0.5)
        steps[name] = step_of(model)
    steps["torchao"] = step_of(patch_by_torchao(copy.deepcopy(dense)))

    ratios = ratios_to_dense(steps, options.rounds, options.cpu_time, options.device)
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


def patch_by_torchao(model: nn.Module) -> nn.Module:
    """Replaces the linear modules by those of torchao's quantization-aware training, in place."""
    from torchao.quantization import PerAxis, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int8, granularity=PerAxis(0), is_symmetric=True)
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"))
    return model


if __name__ == "__main__":
    main()
