"""Texts that several tokenizers read: the student's, and those of teachers that have their own."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorWithPadding
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.tasks.pretrained_tokenizer import check_padding

# How the names of columns begin that are not the student's.
TEACHER = "teacher_"
# Where tokens are classified: for each of the student's that has a label, the place of the teacher's.
PLACES = "places"


def prefix_of(number: int) -> str:
    """How the names of a tokenizer's columns begin."""
    return f"{TEACHER}{number}_"


class AnyTokens:
    """A task that asks the same of a text however it is cut into tokens; see `tasks.Task` for the other verbs."""

    def encode(self, tokenizer: Tokenizer, others: Mapping[str, Tokenizer] | None = None) -> dict[str, Any]:
        """The splits as `tasks.Task` has them, with the columns of other tokenizers.

        Args:
            others: what else reads the texts, by how the names of its columns begin.
        """
        raise NotImplementedError


class OtherTokensCollator:
    """Pads the columns of each tokenizer by themselves.

    Args:
        collator: of the student's columns.
        tokenizer: the student's.
        others: as `AnyTokens.encode` takes them; columns that examples do not have are left out.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], Any], tokenizer: Tokenizer, others: Mapping[str, Tokenizer]
    ) -> None:
        self.collator, self.side = collator, tokenizer.padding_side
        self.others: dict[str, DataCollatorWithPadding] = {}
        for prefix, other in others.items():
            check_padding(other)
            other = copy.deepcopy(other)
            other.padding_side = "right"  # places are counted from the first token
            self.others[prefix] = DataCollatorWithPadding(other)

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collator([{k: v for k, v in row.items() if not k.startswith(TEACHER)} for row in examples])
        for prefix, pad in self.others.items():
            own = [{k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)} for row in examples]
            if PLACES in own[0]:
                batch[prefix + PLACES] = self._padded([row.pop(PLACES) for row in own], batch["input_ids"].shape[1])
            if own[0]:
                for name, values in pad(own).items():
                    batch[prefix + name] = values
        return batch

    def _padded(self, places: Sequence[Sequence[int]], length: int) -> torch.Tensor:
        filled = [[0] * (length - len(row)) for row in places]
        left = self.side == "left"
        return torch.tensor(
            [[*fill, *row] if left else [*row, *fill] for fill, row in zip(filled, places, strict=True)]
        )
