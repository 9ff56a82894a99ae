"""A checkpoint of whatever architecture, as the class that its configuration names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from prunelle.compression import from_pretrained
from prunelle.compression.quantization import QuantizationPlan, read_plan
from prunelle.errors import InputError, load_checkpoint_with
from prunelle.tasks.causal_lm import check_causal
from prunelle.tasks.pretrained_tokenizer import load_tokenizer, pad_alike

# How names of architectures end, what loads them, and the task that can compare their predictions.
HEADS: dict[str, tuple[Any, str]] = {
    "ForSequenceClassification": (AutoModelForSequenceClassification, "text-classification"),
    "ForMaskedLM": (AutoModelForMaskedLM, "masked-lm"),
    "ForTokenClassification": (AutoModelForTokenClassification, "token-classification"),
    "ForQuestionAnswering": (AutoModelForQuestionAnswering, "question-answering"),
    "ForCausalLM": (AutoModelForCausalLM, "causal-lm"),
    "LMHeadModel": (AutoModelForCausalLM, "causal-lm"),
}


@dataclass
class Checkpoint:
    """A model, its tokenizer, and what its head is for.

    Attributes:
        name: the folder or the hub's name that it was loaded by.
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        task: the task of this project that the head is for.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    task: str

    @property
    def folder(self) -> Path | None:
        """Where its files are, None for a model of the hub."""
        return Path(self.name) if Path(self.name).is_dir() else None

    @property
    def plan(self) -> QuantizationPlan | None:
        """What it was trained to have quantized."""
        return read_plan(self.folder)

    def save_without_weights(self, folder: Path) -> None:
        """Writes what stands beside ONNX files: the configuration and the tokenizer."""
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        speak_to_transformers_4(folder)


def speak_to_transformers_4(folder: Path) -> None:
    """Have a tokenizer of no architecture read alike by transformers 4, which optimum still asks for.

    It knows such a tokenizer by its older name alone, and takes away the blank before a text unless told to add it.
    """
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.get("tokenizer_class") != "TokenizersBackend":
        return
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    pre_tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"] or {}
    if "add_prefix_space" in pre_tokenizer:
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_checkpoint(name: str) -> Checkpoint:
    """Loads a checkpoint by its folder or its name on the hub, as the first architecture in its configuration.

    Raises:
        InputError: there is no such checkpoint, it cannot be loaded, its head is of a kind that cannot be
            exported, or weights are missing, which would be drawn at random. Or it sees what it would have to predict.
    """
    config = load_checkpoint_with(AutoConfig.from_pretrained, name)
    (architecture, *_) = config.architectures or ("a model without a head",)
    ending = next((ending for ending in HEADS if architecture.endswith(ending)), None)
    if ending is None:
        raise InputError(f"{name} is {architecture}: only models named …{', …'.join(HEADS)} can be exported")
    auto_class, task = HEADS[ending]
    model, loading = from_pretrained(name, auto_class, config=config, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise InputError(f"{name} is not all of {architecture}: {len(missing)} weights are missing, as {missing[0]}")
    check_causal(model, auto_class, name)
    tokenizer = load_tokenizer(name)
    pad_alike(model, tokenizer)
    return Checkpoint(name, model.eval(), tokenizer, task)
