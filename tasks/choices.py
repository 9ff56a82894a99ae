"""What a head predicts, whatever it is called: choices among classes."""

from typing import Any

import torch
from torch import Tensor, nn


def choices(outputs: Any) -> Tensor:
    """The logits of a model's outputs: of each choice that it makes among classes.

    Returns:
        (batch, classes) of a classifier of texts; (batch, tokens, classes) where each token has its choice; and of a
        question answerer (batch, 2, tokens), which chooses the tokens where an answer starts and where it ends.
    """
    logits = getattr(outputs, "logits", None)
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=1) if logits is None else logits


def answers_questions(model: nn.Module) -> bool:
    """Whether a model chooses among the tokens of its input, rather than among classes or words."""
    return type(model).__name__.endswith("ForQuestionAnswering")
