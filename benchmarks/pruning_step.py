"""What masks cost: a training step with each way of pruning, as a multiple of the same dense step.

    OMP_NUM_THREADS=2 python benchmarks/pruning_step.py
    OMP_NUM_THREADS=1 python benchmarks/pruning_step.py --cpu_time
    python benchmarks/pruning_step.py --device cuda --batch 128 --tokens 128 --bf16

The model has the sizes of MiniLM-L6, with random weights. A step is all that repeats in training: forward, loss and
penalty, backward, fused AdamW (of the scores too), and new masks. Density is held in the middle of its fall, where
masks change at every step; once it has fallen they stay, and cost less. nn_pruning's own masked modules (`pip install
nn_pruning`) do the same in the same run. The variants take turns, in another order every round; the last line is JSON:
of each, the median over the rounds of its time divided by that of the round's dense step.
"""

import argparse
import copy
import functools
import json
from collections.abc import Callable

import torch
from interleaved import ratios_to_dense
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from prunelle.compression.pruning import CubicSchedule, Pruning
from prunelle.compression.pruning.nn_pruning_bridge import import_patch_coordinator

DENSITY = 0.15
SCHEDULE = CubicSchedule(0.05, 0.0, 0.0)
PROGRESS = 1 - ((DENSITY - 0.05) / 0.95) ** (1 / 3)  # where the schedule is at that density


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--cpu_time", action="store_true", help="the process's own time: for a machine with other work")
    options = parser.parse_args()

    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    dense = BertForSequenceClassification(config).to(options.device).train()
    tokens = torch.randint(1000, config.vocab_size, (options.batch, options.tokens), device=options.device)
    labels = torch.randint(2, (options.batch,), device=options.device)
    autocast = functools.partial(torch.autocast, options.device, torch.bfloat16, enabled=options.bf16)

    def step_of(model: nn.Module, method: Pruning | None, penalty: Callable[[], Tensor | float]) -> Callable[[], None]:
        groups = method.parameter_groups() if method else []
        apart = {id(scores) for group in groups for scores in group["params"]}
        weights = [parameter for parameter in model.parameters() if id(parameter) not in apart]
        optimizer = torch.optim.AdamW([{"params": weights}, *groups], lr=1e-5, fused=True)

        def step() -> None:
            with autocast():
                loss = model(input_ids=tokens, labels=labels).loss
            (loss + penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if method is not None:
                method.step(PROGRESS)

        return step

    steps = {"dense": step_of(copy.deepcopy(dense), None, lambda: 0.0)}
    for score in ("magnitude", "soft_movement", "movement"):
        model, method = copy.deepcopy(dense), Pruning(SCHEDULE, score)
        method.attach(model)
        method.step(PROGRESS)
        steps[score] = step_of(model, method, method.penalty)
    for name in ("topK", "sigmoied_threshold"):
        model = copy.deepcopy(dense)
        steps[f"nn_pruning_{name}"] = step_of(model, None, patch_by_nn_pruning(model, name))

    ratios = ratios_to_dense(steps, options.rounds, options.cpu_time, options.device)
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


def patch_by_nn_pruning(model: nn.Module, name: str) -> Callable[[], Tensor | float]:
    """Masks a BERT's layers as nn_pruning does, in place; the penalty is the one that it puts on sigmoids."""
    import_patch_coordinator()
    from nn_pruning.model_structure import BertStructure
    from nn_pruning.modules import masked_nn
    from nn_pruning.training_patcher import BertLinearModelPatcher, PatcherContext

    context = PatcherContext()
    is_soft = name == "sigmoied_threshold"
    context.set_context_data_dict({"threshold": 0.1 if is_soft else DENSITY})
    arguments = masked_nn.LinearPruningArgs(name, "default", "disabled", 1, 1, min_elements=0.005)
    patcher = masked_nn.LinearPruningModulePatcher(context, arguments, BertStructure)
    BertLinearModelPatcher(dict.fromkeys(BertLinearModelPatcher.LAYERS_PATTERNS, patcher)).patch(model)
    masks = list(context.context_modules["mask"].values())
    return lambda: sum(mask.regularization("l1") for mask in masks) / len(masks) if is_soft else 0.0


if __name__ == "__main__":
    main()
