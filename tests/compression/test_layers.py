"""The layer list is found by structure, and never guessed."""

from collections.abc import Callable

import pytest
import transformers
from torch import nn
from transformers import PreTrainedModel

from prunelle.compression import find_layers
from prunelle.errors import InputError

Make = Callable[..., PreTrainedModel]


@pytest.mark.parametrize(
    ("model", "name", "block"),
    [
        ("BertForMaskedLM", "bert.encoder.layer", "BertLayer"),
        ("BertModel", "encoder.layer", "BertLayer"),
        ("RobertaForSequenceClassification", "roberta.encoder.layer", "RobertaLayer"),
        ("DistilBertForMaskedLM", "distilbert.transformer.layer", "TransformerBlock"),
        ("ElectraForMaskedLM", "electra.encoder.layer", "ElectraLayer"),
        ("MPNetForMaskedLM", "mpnet.encoder.layer", "MPNetLayer"),
        ("DebertaV2ForSequenceClassification", "deberta.encoder.layer", "DebertaV2Layer"),
        ("ModernBertForMaskedLM", "model.layers", "ModernBertEncoderLayer"),
        ("GPT2LMHeadModel", "transformer.h", "GPT2Block"),
    ],
)
def test_finds_the_layers_of_each_architecture(make: Make, model: str, name: str, block: str) -> None:
    """Surgery on a list that is not the layers would leave the model as deep as before, silently."""
    teacher = make(model)
    found = find_layers(teacher)
    assert found.name == name
    assert found.modules is teacher.get_submodule(name)
    assert [type(layer).__name__ for layer in found.modules] == [block] * 5


def test_lists_in_the_layers_and_in_the_head_do_not_count(make: Make) -> None:
    """A list of as many parts within each layer, or in the head, must not make the choice ambiguous."""
    teacher = make("BertForMaskedLM")
    for layer in teacher.bert.encoder.layer:
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    teacher.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    assert find_layers(teacher).name == "bert.encoder.layer"


def test_layers_shared_by_all_depths_are_refused() -> None:
    """ALBERT runs one layer many times: to take it for a list of layers would drop nothing, or everything."""
    config = transformers.AlbertConfig(
        vocab_size=20,
        hidden_size=8,
        embedding_size=8,
        num_attention_heads=2,
        intermediate_size=8,
        num_hidden_layers=4,
    )
    with pytest.raises(InputError, match=r"no list of 4 layers .*albert_layer_groups \(1 x AlbertLayerGroup\)"):
        find_layers(transformers.AlbertModel(config))


def test_an_encoder_and_a_decoder_are_refused() -> None:
    """Of two stacks, the first found is no better than the second."""
    config = transformers.BartConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    with pytest.raises(InputError, match=r"several lists of 2 layers .*encoder\.layers .*decoder\.layers") as error:
        find_layers(transformers.BartModel(config))
    assert "\n" not in str(error.value)


def test_blocks_of_several_classes_are_refused(make: Make) -> None:
    teacher = make("BertModel")
    teacher.encoder.layer[2] = nn.Identity()
    with pytest.raises(InputError, match="5 x BertLayer or Identity"):
        find_layers(teacher)


def test_a_config_that_disagrees_with_the_model_is_refused(make: Make) -> None:
    """A stack shortened by hand, config untouched, cannot be saved and loaded: better said now than then."""
    teacher = make("BertModel")
    del teacher.encoder.layer[4]
    with pytest.raises(InputError, match=r"no list of 5 layers .*4 x BertLayer"):
        find_layers(teacher)
