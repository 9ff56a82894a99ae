"""Causal language modelling on text packed into full blocks."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, default_data_collator
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.errors import InputError
from prunelle.tasks.masking import IGNORED
from prunelle.tasks.packing import PackedTexts


class CausalLanguageModelling(PackedTexts):
    """Each word is predicted from those before it.

    Labels are shifted here and nowhere else: the label at a position is the token that follows it, so that every
    task's logits and labels stand at the same positions. The models' own loss would shift them again; it is not
    used.
    """

    auto_model_class = AutoModelForCausalLM

    def encode(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The splits as full blocks: `input_ids`, `attention_mask`, and the next tokens as `labels`, the last -100.

        Raises:
            InputError: The text does not fill one block.
        """

        def ask_for_the_next(block: dict[str, list[int]]) -> dict[str, list[int]]:
            ids = block["input_ids"]
            return {"attention_mask": [1] * len(ids), "labels": [*ids[1:], IGNORED]}

        return {split: packed.map(ask_for_the_next) for split, packed in self.pack(tokenizer).items()}

    def collator(self, tokenizer: Tokenizer, encoded: dict[str, Any]) -> Any:
        """Stacks: all blocks are equally long."""
        return default_data_collator


def check_causal(model: PreTrainedModel, auto_model_class: Any, name: str) -> None:
    """See that a model loaded as a causal one does not read the words that it is to predict, whatever it is called.

    `AutoModelForCausalLM` takes an encoder such as BERT too. It is tried on two inputs that differ in the last token.

    Raises:
        InputError: What it says before the last token depends on that.
    """
    if auto_model_class is not AutoModelForCausalLM:
        return
    ids = torch.arange(4).repeat(2, 1)
    ids[1, -1] += 1
    was_training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.train(was_training)
    moved = (logits[0, :-1] - logits[1, :-1]).abs().max()
    if moved > 1e-4 * logits.abs().max():
        raise InputError(
            f"{name} sees the words that it would have to predict: --task causal-lm needs a decoder, such as GPT-2, or "
            'a BERT whose configuration says "is_decoder": true'
        )
