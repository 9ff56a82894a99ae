"""Causal language modelling on text packed into full blocks."""

from typing import Any

from transformers import AutoModelForCausalLM, default_data_collator
from transformers import PreTrainedTokenizerBase as Tokenizer

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
