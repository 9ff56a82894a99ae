"""Models in the hands of nn_pruning, and in ours: what the tests that compare the two have in common."""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from prunelle.compression.pruning import Pruning
from prunelle.compression.pruning.masks import LearnedMask
from prunelle.compression.pruning.nn_pruning_bridge import import_patch_coordinator

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BATCH = {"input_ids": torch.arange(4, 28).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}

# Runs whose checkpoints are to be read: its `SparseTrainingArguments`, beyond the defaults.
RUNS: dict[str, dict[str, Any]] = {
    "single weights": {"final_threshold": 0.3},
    "biases that stay": {"final_threshold": 0.1, "bias_mask": False},
    "blocks, other ones for the attention output": {
        "attention_block_rows": 8,
        "attention_block_cols": 2,
        "attention_output_with_dense": False,
        "dense_block_cols": 4,
    },
    "the published hybrid": {
        "attention_pruning_method": "sigmoied_threshold",
        "attention_block_rows": 4,
        "attention_block_cols": 4,
        "dense_pruning_method": "sigmoied_threshold:1d_alt",
        "final_threshold": 0.4,
    },
    "a threshold that nothing reaches": {
        "attention_pruning_method": "sigmoied_threshold",
        "dense_pruning_method": "threshold",
        "final_threshold": 0.999,
        "linear_min_parameters": 0.1,
    },
    "dimensions, and a part of one": {"dense_pruning_method": "topK:1d_alt", "final_threshold": 0.4},
    "rows times columns": {"dense_pruning_method": "topK:1d", "final_threshold": 0.2},
    "gates": {"attention_pruning_method": "l0", "dense_pruning_method": "l0"},
    "a pattern along the inputs": {"ampere_pruning_method": "sigmoied_threshold", "attention_block_rows": 4},
    "a pattern along the outputs": {
        "ampere_pruning_method": "annealing",
        "attention_pruning_method": "disabled",
        "dense_pruning_method": "disabled",
    },
    "activations that became ReLUs": {"gelu_patch": True},
}


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=3, initializer_range=0.3)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def patched(options: dict[str, Any], draw: bool = True) -> tuple[PreTrainedModel, Any]:
    """A model in nn_pruning's hands, with random scores or its own, which are 0; and its coordinator."""
    module = import_patch_coordinator()
    coordinator = module.ModelPatchingCoordinator(
        module.SparseTrainingArguments(**options), "cpu", None, ["logits"], None
    )
    model = tiny()
    coordinator.patch_model(model)
    for name, parameter in model.eval().named_parameters():
        if "mask_scores" in name and draw:
            nn.init.normal_(parameter)
    return model, coordinator


def scores_of(masked: Any) -> nn.Parameter:
    """The scores of one of nn_pruning's masked modules."""
    contexts = masked.mask_module.context_modules if masked.args.ampere_method == "disabled" else []
    found = [context for context in contexts if context is not None]
    (context,) = found or [masked.ampere_module.context_module]
    return context.mask_scores


def attach(theirs: PreTrainedModel, methods: list[Pruning]) -> PreTrainedModel:
    """The same model in our hands, with the same scores."""
    ours = tiny()
    with torch.no_grad():
        for method in methods:
            method.attach(ours)
            for name, mask in method.masks.items():
                scores = scores_of(theirs.get_submodule(name.removesuffix(".weight")))
                if isinstance(mask, LearnedMask):
                    mask.scores.copy_(scores.view_as(mask.scores))
    return ours
