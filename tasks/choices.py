"""What a head predicts, whatever it is called: choices among classes."""

from typing import Any

import torch
from torch import Tensor, nn

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"


def choices(outputs: Any, multi_label: bool = False) -> Tensor:
    """The logits of a model's outputs: of each choice that it makes among classes.

    Args:
        multi_label: whether each class is a choice of its own.

    Returns:
        (batch, classes) of a classifier of texts; (batch, tokens, classes) where each token has its choice; and of a
        question answerer (batch, 2, tokens), which chooses the tokens where an answer starts and where it ends. Of
        several labels (batch, labels, 2): the logits of no and of yes, whose softmax is the sigmoid.
    """
    logits = getattr(outputs, "logits", None)
    if logits is None:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
    return torch.stack([torch.zeros_like(logits), logits], dim=-1) if multi_label else logits


def answers_questions(model: nn.Module) -> bool:
    """Whether a model chooses among the tokens of its input, rather than among classes or words."""
    return type(model).__name__.endswith("ForQuestionAnswering")


def problem_type(model: nn.Module) -> str | None:
    """What a classifier of texts says that it predicts; None where it does not say."""
    return getattr(model.config, "problem_type", None)
