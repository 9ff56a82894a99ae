"""Extractive question answering: where in a text the answer to a question stands."""

from collections.abc import Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from transformers import AutoModelForQuestionAnswering, PreTrainedConfig, default_data_collator
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks import loading, metrics
from prunelle.tasks.arguments import DataArguments
from prunelle.tasks.loading import find_column, load_splits, where
from prunelle.tasks.pretrained_tokenizer import check_padding
from prunelle.tasks.reading import Predictions, ReadsLogits

CONTEXT_NAMES = ("context", "passage", "text")
QUESTION_NAMES = ("question", "query")
ANSWER_NAMES = ("answers", "answer")

FED = ("input_ids", "attention_mask", "token_type_ids", "labels")


class QuestionAnswering(ReadsLogits):
    """Questions, contexts and answers, found and checked; see `tasks.Task` for the verbs.

    A context too long for the model is read in windows that overlap by `--doc_stride` tokens. In each the model
    chooses the tokens where the answer starts and where it ends: the first token of all, as a rule [CLS], where the
    window does not hold the whole answer. The answer to a question is the best span of all its windows.

    Columns are those of SQuAD (arXiv:1606.05250), `answers` being the texts and where in the context they start:
    `{"text": […], "answer_start": […]}`. Where the training data has questions without an answer, as SQuAD 2.0
    (arXiv:1806.03822), the model may find none.

    Args:
        arguments: Where the data is.
        seed: Draws the validation data where none is given.

    Raises:
        InputError: Data that cannot be read or is empty, a column that is not there, an answer that does not stand
            where it is said to.
    """

    auto_model_class = AutoModelForQuestionAnswering

    def __init__(self, arguments: DataArguments, seed: int) -> None:
        self.arguments = arguments
        self.splits: dict[str, Any] = {}
        for split, rows in load_splits(arguments, seed).items():
            place = where(arguments, split)
            columns = {
                find_column(rows, arguments.text_column_name, CONTEXT_NAMES, "text_column_name", place): "context",
                find_column(
                    rows, arguments.question_column_name, QUESTION_NAMES, "question_column_name", place
                ): "question",
                find_column(rows, arguments.label_column_name, ANSWER_NAMES, "label_column_name", place): "answers",
            }
            self.splits[split] = _checked(rows.select_columns(list(columns)).rename_columns(columns), place)
        self.finds_none = any(not texts for texts in self.splits["train"]["texts"])

    def fingerprint(self, unlabeled: bool = True) -> str:
        """A hash of the data, with or without what is unlabeled, and of how it is prepared."""
        return loading.fingerprint(self.splits, self.arguments, unlabeled)

    def texts(self, splits: Sequence[str] = ("train",)) -> Any:
        """The texts that tokenizers are to read, of the training data or of the splits named."""
        columns = ("context", "question")
        return chain.from_iterable(self.splits[split][column] for split in splits for column in columns)

    def configure(self, config: PreTrainedConfig) -> None:
        """Two numbers a token: how well an answer would start there, and how well it would end."""
        config.id2label = {0: "LABEL_0", 1: "LABEL_1"}  # not those of a classifier that the model was before
        config.label2id = {name: index for index, name in config.id2label.items()}

    def adopt(self, config: PreTrainedConfig, model_name: str) -> None:
        """All models choose among the tokens: nothing to take over."""

    def encode(self, tokenizer: Tokenizer) -> dict[str, datasets.Dataset]:
        """The splits as windows, all of `--max_seq_length` tokens: what the tokenizer gives, and `labels`.

        `labels` are two, the tokens where the answer starts and ends. All windows are equally long, so that each
        choice is among as many tokens. But for training, a window also knows its `example`, and the `offsets` of its
        tokens in the context, (0, 0) for those of the question.

        Raises:
            InputError: The tokenizer cannot say where its tokens stand, or has nothing to pad with; or a question
                leaves no room for the context.
        """
        if not tokenizer.is_fast:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path} does not say where in the text a token stands: "
                "--task question-answering needs a fast one"
            )
        check_padding(tokenizer)
        return {split: self._encode_split(split, rows, tokenizer) for split, rows in self.splits.items()}

    def collator(self, tokenizer: Tokenizer, encoded: dict[str, datasets.Dataset]) -> Any:
        """Stacks what models are fed with: all windows are equally long."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            return default_data_collator([{name: row[name] for name in FED if name in row} for row in rows])

        return collate

    def choices(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Of (windows, tokens, 2): (windows, 2, tokens)."""
        return logits.swapaxes(1, 2)

    def read(self, logits: NDArray[Any], rows: Any, split: str) -> Predictions:
        """The best span of each example's windows, as text, "" where there is none.

        How sure it is: its probability among all spans less the next one's.

        Args:
            logits: (windows, 2, tokens), of starts and of ends.
            rows: the split's windows, from `encode`, in the same order.
            split: its name.
        """
        windows, rows = rows, self.splits[split]
        texts, margins = [], np.zeros(len(rows))
        read = zip(windows["example"], windows["offsets"], logits.astype(np.float64), strict=True)
        for (example, its_windows), context in zip(groupby(read, itemgetter(0)), rows["context"], strict=True):
            scored, none = [], np.inf
            for _, offsets, (starts, ends) in its_windows:
                scored.append(_scored_spans(np.asarray(offsets), starts, ends, self.arguments.max_answer_length))
                none = min(none, starts[0] + ends[0])
            if self.finds_none:
                scored.append(np.array([[0.0, 0.0, none]]))
            start, end, margins[example] = _best_span(np.concatenate(scored))
            texts.append(context[start:end].strip())  # some tokens begin with the space before a word
        references = rows["texts"][:]
        pairs = zip(texts, references, strict=True)
        return Predictions(
            values=np.array(texts, dtype=object),
            margins=margins,
            references=np.array([" / ".join(right) for right in references], dtype=object),
            errors=np.array([1.0 - metrics.matches(*pair) for pair in pairs]),
            metrics=self.compute_metrics(texts, references),
        )

    @staticmethod
    def compute_metrics(predictions: Any, references: Any) -> dict[str, float]:
        return metrics.compute([metrics.AnswerMatch], predictions, references)

    def _encode_split(self, split: str, rows: datasets.Dataset, tokenizer: Tokenizer) -> datasets.Dataset:
        length, stride = self.arguments.max_seq_length, self.arguments.doc_stride
        special = tokenizer.num_special_tokens_to_add(pair=True)
        questions = tokenizer(rows["question"][:], add_special_tokens=False, verbose=False)["input_ids"]
        for number, question in enumerate(questions, start=1):
            if (room := length - special - len(question)) <= stride:
                raise InputError(
                    f"{where(self.arguments, split)}, example {number}: a question of {len(question)} tokens leaves "
                    f"{max(room, 0)} for the context, no more than windows overlap (--doc_stride {stride}): give more "
                    "--max_seq_length or less --doc_stride"
                )

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            encoded = tokenizer(
                batch["question"],
                batch["context"],
                truncation="only_second",
                max_length=length,
                stride=stride,
                padding="max_length",
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            sources = encoded.pop("overflow_to_sample_mapping")
            offsets = [
                [span if part == 1 else (0, 0) for part, span in zip(encoded.sequence_ids(window), spans, strict=True)]
                for window, spans in enumerate(encoded.pop("offset_mapping"))
            ]
            for source, spans in zip(sources, offsets, strict=True):
                if not any(end for _, end in spans):
                    raise InputError(
                        f"{where(self.arguments, split)}, example {numbers[source] + 1}: the tokenizer finds no words "
                        "in the context"
                    )
            labels = [
                _tokens_of(np.asarray(spans), batch["starts"][source], batch["texts"][source])
                for source, spans in zip(sources, offsets, strict=True)
            ]
            known = {} if split == "train" else {"example": [numbers[s] for s in sources], "offsets": offsets}
            return {**encoded, "labels": labels, **known}

        description = f"Tokenizing {split}"
        return rows.map(encode, batched=True, with_indices=True, remove_columns=rows.column_names, desc=description)


def _tokens_of(offsets: NDArray[np.int64], starts: list[int], texts: list[str]) -> list[int]:
    """The tokens where the first answer starts and ends; twice 0 where the window does not hold all of it."""
    if not texts:
        return [0, 0]
    start, end = starts[0], starts[0] + len(texts[0])
    first = np.flatnonzero((offsets[:, 0] <= start) & (start < offsets[:, 1]))
    last = np.flatnonzero((offsets[:, 0] < end) & (end <= offsets[:, 1]))
    return [int(first[0]), int(last[0])] if len(first) and len(last) else [0, 0]


def _scored_spans(
    offsets: NDArray[np.int64], starts: NDArray[np.float64], ends: NDArray[np.float64], longest: int
) -> NDArray[np.float64]:
    """(spans, 3): where in the context each span of a window that may be an answer starts and ends, and its score."""
    context = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    apart = np.arange(len(context))[None, :] - np.arange(len(context))[:, None]
    firsts, lasts = (context[chosen] for chosen in np.nonzero((apart >= 0) & (apart < longest)))
    return np.stack([offsets[firsts, 0], offsets[lasts, 1], starts[firsts] + ends[lasts]], axis=1)


def _best_span(scored: NDArray[np.float64]) -> tuple[int, int, float]:
    """Where the best span starts and ends, and its probability among all less the next one's.

    What stands in several windows has the score of the best.

    Args:
        scored: (spans, 3), as `_scored_spans` gives them for each window.
    """
    spans, place = np.unique(scored[:, :2] @ [2.0**32, 1.0], return_inverse=True)
    scores = np.full(len(spans), -np.inf)
    np.maximum.at(scores, place, scored[:, 2])
    best = int(scores.argmax())
    probabilities = np.exp(scores - scores[best])
    others = np.delete(probabilities, best)
    start, end = divmod(int(spans[best]), 2**32)
    return start, end, float((1.0 - others.max(initial=0.0)) / probabilities.sum())


def _checked(rows: datasets.Dataset, place: str) -> datasets.Dataset:
    """The examples with the answers as two columns, `texts` and `starts`.

    Raises:
        InputError: A question or context is missing, or an answer does not stand where it is said to.
    """
    texts: list[list[str]] = []
    starts: list[list[int]] = []
    for number, row in enumerate(rows, start=1):
        for name in ("context", "question"):
            if not isinstance(row[name], str) or not row[name].strip():
                raise InputError(f"{place}, example {number}: there is no {name} but {row[name]!r}")
        answers = row["answers"]
        if isinstance(answers, list):  # one record an answer
            answers = {key: [answer.get(key) for answer in answers] for key in ("text", "answer_start")}
        if not isinstance(answers, dict) or not {"text", "answer_start"} <= answers.keys():
            raise InputError(
                f'{place}, example {number}: answers must be {{"text": […], "answer_start": […]}}, not {answers!r}'
            )
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if not text or row["context"][start : start + len(text)] != text:
                raise InputError(
                    f"{place}, example {number}: the answer {text!r} does not stand at character {start} of the context"
                )
        texts.append(list(answers["text"]))
        starts.append(list(answers["answer_start"]))
    kept = rows.select_columns(["context", "question"])
    text, place_in_text = datasets.List(datasets.Value("string")), datasets.List(datasets.Value("int64"))
    return kept.add_column("texts", texts, feature=text).add_column("starts", starts, feature=place_in_text)
