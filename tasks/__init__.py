"""What is learned: a head, columns, a collator and metrics. Data sets come in here."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.tasks.arguments import DataArguments as DataArguments
from prunelle.tasks.arguments import DistillationDataArguments as DistillationDataArguments
from prunelle.tasks.arguments import TaskName as TaskName
from prunelle.tasks.causal_lm import CausalLanguageModelling as CausalLanguageModelling
from prunelle.tasks.choices import answers_questions as answers_questions
from prunelle.tasks.choices import choices as choices
from prunelle.tasks.choices import problem_type as problem_type
from prunelle.tasks.classes import Classification as Classification
from prunelle.tasks.masked_lm import MaskedLanguageModelling as MaskedLanguageModelling
from prunelle.tasks.multi_label import MultiLabelClassification as MultiLabelClassification
from prunelle.tasks.question_answering import QuestionAnswering as QuestionAnswering
from prunelle.tasks.reading import Predictions as Predictions
from prunelle.tasks.reading import ReadsLogits as ReadsLogits
from prunelle.tasks.regression import TextRegression as TextRegression
from prunelle.tasks.sequence_to_sequence import SequenceToSequence as SequenceToSequence
from prunelle.tasks.several_tokenizers import AnyTokens as AnyTokens
from prunelle.tasks.several_tokenizers import OtherTokensCollator as OtherTokensCollator
from prunelle.tasks.text_classification import TextClassification as TextClassification
from prunelle.tasks.text_classification import TextTask as TextTask
from prunelle.tasks.token_classification import TokenClassification as TokenClassification


class Task(Protocol):
    """What a task can do. Made from the data arguments and a seed; the data is read and checked at once.

    `compute_metrics` is given the predictions and labels of all evaluation data, shaped alike: (examples,) or
    (examples, tokens), the labels -100 where nothing is asked, and the predictions of no meaning there. Tasks
    that are `ReadsLogits` say for themselves what it is given.
    """

    auto_model_class: Any
    splits: dict[str, Any]

    def fingerprint(self, unlabeled: bool = True) -> str: ...
    def texts(self, splits: Sequence[str] = ...) -> Any: ...
    def configure(self, config: PreTrainedConfig) -> None: ...
    def adopt(self, config: PreTrainedConfig, model_name: str) -> None: ...
    def encode(self, tokenizer: Tokenizer) -> dict[str, Any]: ...
    def collator(self, tokenizer: Tokenizer, encoded: dict[str, Any]) -> Any: ...
    def compute_metrics(self, predictions: Any, references: Any) -> dict[str, float]: ...


def text_classification(arguments: DataArguments, seed: int) -> Task:
    """The task of the problem type that is asked for."""
    problems: dict[str, Callable[[DataArguments, int], Task]] = {
        "single_label_classification": TextClassification,
        "multi_label_classification": MultiLabelClassification,
        "regression": TextRegression,
    }
    return problems[arguments.problem_type](arguments, seed)


TASKS: dict[str, Callable[[DataArguments, int], Task]] = {
    "text-classification": text_classification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "masked-lm": MaskedLanguageModelling,
    "causal-lm": CausalLanguageModelling,
    "sequence-to-sequence": SequenceToSequence,
}
