"""What is learned: a head, columns, a collator and metrics. Data sets come in here."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.tasks.arguments import DataArguments as DataArguments
from prunelle.tasks.arguments import DistillationDataArguments as DistillationDataArguments
from prunelle.tasks.causal_lm import CausalLanguageModelling as CausalLanguageModelling
from prunelle.tasks.classes import Classification as Classification
from prunelle.tasks.masked_lm import MaskedLanguageModelling as MaskedLanguageModelling
from prunelle.tasks.sequence_to_sequence import SequenceToSequence as SequenceToSequence
from prunelle.tasks.text_classification import TextClassification as TextClassification
from prunelle.tasks.token_classification import TokenClassification as TokenClassification


class Task(Protocol):
    """What a task can do. Made from the data arguments and a seed; the data is read and checked at once.

    `compute_metrics` is given the predictions and labels of all evaluation data, shaped alike: (examples,) or
    (examples, tokens), the labels -100 where nothing is asked, and the predictions of no meaning there.
    """

    auto_model_class: Any
    splits: dict[str, Any]

    def fingerprint(self, unlabeled: bool = True) -> str: ...
    def texts(self) -> Any: ...
    def configure(self, config: PreTrainedConfig) -> None: ...
    def adopt(self, config: PreTrainedConfig, model_name: str) -> None: ...
    def encode(self, tokenizer: Tokenizer) -> dict[str, Any]: ...
    def collator(self, tokenizer: Tokenizer, encoded: dict[str, Any]) -> Any: ...
    def compute_metrics(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]: ...


TASKS: dict[str, Callable[[DataArguments, int], Task]] = {
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "masked-lm": MaskedLanguageModelling,
    "causal-lm": CausalLanguageModelling,
    "sequence-to-sequence": SequenceToSequence,
}
