"""Students of encoder-decoders: layers of both stacks, and either stack whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from prunelle.compression import find_stacks, student_from_layers
from prunelle.errors import InputError

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 4, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "decoder_input_ids": torch.tensor([[1, 5, 9], [1, 7, 6]]),
}


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: Any
    if family == "t5":
        sizes: dict[str, Any] = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "vocab_size": 40}
        depths = {"num_layers": 4, "num_decoder_layers": 3}
        model = T5ForConditionalGeneration(T5Config(**sizes, **depths, decoder_start_token_id=0))
    else:
        sizes = {"d_model": 16, "vocab_size": 40, "encoder_layers": 4, "decoder_layers": 3}
        sizes |= {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}
        model = BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=["t5", "bart"])
def teacher(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(request.param)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH, use_cache=False).logits


def test_both_stacks_are_found_by_their_own_depth(teacher: PreTrainedModel) -> None:
    """A decoder deeper or shallower than the encoder is the rule among students."""
    encoder, decoder = find_stacks(teacher)
    assert [len(encoder.modules), len(decoder.modules)] == [4, 3]
    assert "encoder" in encoder.name
    assert "decoder" in decoder.name


@pytest.mark.parametrize(("layers", "decoder_layers"), [(None, None), ([0, 3], None), (None, [0, 2]), ([0, 2, 1], [0])])
def test_a_student_computes_what_its_layers_did_in_the_teacher(
    teacher: PreTrainedModel, layers: list[int] | None, decoder_layers: list[int] | None, tmp_path: Path
) -> None:
    """A layer in the wrong stack or place, or a depth that its config tells wrongly, shows only on loading.

    The reference is the teacher itself, with the layers left out taken from its lists.
    """
    student = student_from_layers(teacher, layers, decoder_layers)
    student.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    if layers is decoder_layers is None:
        assert torch.equal(logits(again), logits(teacher))
    for stack, kept in zip(find_stacks(teacher), (layers, decoder_layers), strict=True):
        if kept is not None:
            parent, attribute = stack.name.rsplit(".", 1)
            setattr(teacher.get_submodule(parent), attribute, nn.ModuleList(stack.modules[i] for i in kept))
    assert torch.equal(logits(again), logits(teacher))
    assert [len(stack.modules) for stack in find_stacks(again)] == [
        4 if layers is None else len(layers),
        3 if decoder_layers is None else len(decoder_layers),
    ]


def test_what_cannot_be_taken_is_named_with_its_stack() -> None:
    """T5's first layers hold the relative positions of all: without them a student attends to bags of words."""
    teacher = make("t5")
    with pytest.raises(InputError, match=r"student decoder layer 1 would not compute at place 0 .*keep layer 0"):
        student_from_layers(teacher, None, [1, 2])
    with pytest.raises(InputError, match="student encoder layer 4 does not exist: the teacher's are 0 to 3"):
        student_from_layers(teacher, [0, 4])


def test_a_decoder_that_is_not_there_is_refused() -> None:
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
    with pytest.raises(InputError, match="BertModel has no encoder beside a decoder"):
        student_from_layers(BertModel(BertConfig(**sizes, num_hidden_layers=2)), [0], [0])
