"""Teachers that read a text by a tokenizer of their own."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks import AnyTokens, Task
from prunelle.tasks.several_tokenizers import PLACES, prefix_of


class OwnTokens(nn.Module):
    """A teacher that reads its own tokens of the texts that the student reads.

    Args:
        teacher: a classifier of texts or of tokens.
        prefix: how the names of its inputs begin, as `tasks.AnyTokens` makes them.
    """

    def __init__(self, teacher: PreTrainedModel, prefix: str) -> None:
        super().__init__()
        self.teacher, self.prefix, self.config = teacher, prefix, teacher.config
        names = (name for name in inspect.signature(teacher.forward).parameters if name != "labels")
        self.own_inputs = tuple(prefix + name for name in (*names, PLACES))

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Any:
        """What the teacher returns; where tokens are classified, its logits stand where the student's labels do.

        Args:
            inputs: (batch, tokens) by names that begin with the prefix.
            input_ids, attention_mask: (batch, tokens) of its own, read where `inputs` has none: to time it.
        """
        own = {name.removeprefix(self.prefix): value for name, value in inputs.items() if name in self.own_inputs}
        places = own.pop(PLACES, None)
        outputs = self.teacher(**own or {"input_ids": input_ids, "attention_mask": attention_mask})
        if places is not None:
            classes = outputs.logits.shape[-1]
            outputs.logits = outputs.logits.gather(1, places.unsqueeze(-1).expand(-1, -1, classes))
        return outputs


class Readers:
    """The tokenizers of a run.

    Args:
        tokenizer: the student's.
        task: what is asked of the texts.

    Attributes:
        others: as `tasks.AnyTokens` takes them.
    """

    def __init__(self, tokenizer: Tokenizer, task: Task) -> None:
        self.tokenizer, self.task = tokenizer, task
        self.others: dict[str, Tokenizer] = {}

    def fit(self, teacher: PreTrainedModel, tokenizer: Tokenizer) -> nn.Module:
        """The teacher, which reads its own tokens if they are not the student's.

        Raises:
            InputError: They are not, and predictions are made token by token.
        """
        vocabulary = tokenizer.get_vocab()
        if vocabulary == self.tokenizer.get_vocab():
            return teacher
        if not isinstance(self.task, AnyTokens):
            raise InputError(
                f"the vocabularies differ: {teacher.name_or_path or 'the teacher'} has {len(tokenizer)} tokens and the "
                f"student {len(self.tokenizer)}, or they stand for other words; this task compares what is said token "
                "by token, so both must read the same token ids"
            )
        for prefix, known in self.others.items():
            if known.get_vocab() == vocabulary:
                return OwnTokens(teacher, prefix)
        prefix = prefix_of(len(self.others) + 1)
        self.others[prefix] = tokenizer
        return OwnTokens(teacher, prefix)
