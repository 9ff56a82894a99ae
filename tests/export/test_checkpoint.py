import json

import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from prunelle.errors import InputError
from prunelle.export import load_checkpoint

SMALL = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
MODELS = {
    "classifier": (lambda: BertForSequenceClassification(BertConfig(**SMALL)), "text-classification"),
    "masked language model": (lambda: BertForMaskedLM(BertConfig(**SMALL)), "masked-lm"),
    "token classifier": (lambda: BertForTokenClassification(BertConfig(**SMALL)), "token-classification"),
    "causal language model": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16)),
        "causal-lm",
    ),
}


def saved(model, folder):
    from tokenizers import Tokenizer, models

    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("make", "task"), MODELS.values(), ids=MODELS)
def test_the_head_is_the_checkpoints_own(make, task, tmp_path):
    """A class chosen by the task asked for would put a head drawn at random on another model's weights."""
    model = make()
    checkpoint = load_checkpoint(saved(model, tmp_path))
    assert type(checkpoint.model) is type(model)
    assert checkpoint.task == task
    assert not checkpoint.model.training


def test_a_head_that_is_not_in_the_files_is_refused(tmp_path):
    """transformers draws missing weights at random and says so in a log; the export would pass every check."""
    folder = saved(BertModel(BertConfig(**SMALL)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(InputError, match=r"not all of BertForSequenceClassification: 2 weights are missing, as class"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: BertModel(BertConfig(**SMALL)), "BertModel"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            "T5ForConditionalGeneration",
        ),
    ],
)
def test_a_head_that_cannot_be_exported_is_named(make, named, tmp_path):
    """An encoder without its decoder, or without a head, exports without complaint and predicts nothing."""
    with pytest.raises(InputError, match=rf"is {named}: only models named …ForSequenceClassification"):
        load_checkpoint(saved(make(), tmp_path))
