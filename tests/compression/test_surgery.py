"""What was pruned goes, what the model computes stays."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

import prunelle
from prunelle.compression import distilbert_from_bert, student_from_layers
from prunelle.compression.anatomy import dissect, matrix
from prunelle.compression.pruning import shrink
from prunelle.errors import InputError

Make = Callable[..., PreTrainedModel]
Batch = dict[str, torch.Tensor]

HEADS, DIMENSIONS = 2, 24


@torch.no_grad()
def prune(model: PreTrainedModel) -> PreTrainedModel:
    """Zeros in each way that pruning leaves them, a different one in every layer."""
    layers = dissect(model)
    forget(layers[0].heads, [0])
    silence(layers[0].ffn, range(16))
    silence(layers[1].heads, [1], producer=layers[1].values)
    forget(layers[1].ffn, [1, 5, 7])
    forget(layers[2].heads, [0, 1])
    forget(layers[2].ffn, range(DIMENSIONS))
    silence(layers[3].ffn, range(DIMENSIONS))
    silence(layers[3].heads, [0, 1], producer=layers[3].values)
    return model


def forget(units: Any, places: Any) -> None:
    """Nothing of these units is read."""
    matrix(units.consumer[1])[:, units.inputs(list(places))] = 0


def silence(units: Any, places: Any, producer: str | None = None) -> None:
    """These units are made of nothing but their biases (a gated dimension's first factor is zero, bias and all)."""
    for name, module in units.producers.items():
        outputs = units.outputs(list(places))
        if units.parts > 1:
            of_one_part = len(outputs) // units.parts
            outputs = outputs[-of_one_part:] if units.size > 1 else outputs[:of_one_part]
        if producer in (None, name):
            matrix(module)[outputs] = 0
            if units.parts == 2 and module.bias is not None:
                module.bias[outputs] = 0


def outcome(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits; of a language model those at attended tokens (elsewhere a window of padding has no mean to give)."""
    with torch.no_grad():
        logits = model(**batch).logits
    return logits if logits.dim() == 2 else logits[batch["attention_mask"].bool()]


def sizes(model: PreTrainedModel) -> list[tuple[int, int]]:
    return [(layer.heads.count, layer.ffn.count) for layer in dissect(model)]


def test_a_shrunk_model_computes_what_the_pruned_one_did(teacher: PreTrainedModel, batch: Batch) -> None:
    """Prevents a head or dimension cut at the wrong place, and constants lost with what gave them."""
    pruned = prune(teacher)
    before = copy.deepcopy(pruned.state_dict())
    small = shrink(pruned)
    torch.testing.assert_close(outcome(small, batch), outcome(pruned, batch), rtol=0, atol=1e-5)
    expected = [(1, 8), (1, 24), (0, 0), (0, 0), (2, 24)]
    if isinstance(teacher.config, transformers.ModernBertConfig):
        expected = [(1, 8), (1, 24), (2, 24)]  # two layers that add nothing to the sum, no bias either
    assert sizes(small) == expected
    assert small.num_parameters() < pruned.num_parameters()
    assert all(torch.equal(weight, before[name]) for name, weight in pruned.state_dict().items())


def test_a_shrunk_checkpoint_comes_back(teacher: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
    """Prevents checkpoints that nothing loads, or that a stock class fills up with random weights."""
    small = shrink(prune(teacher))
    small.save_pretrained(tmp_path)
    again, loading = prunelle.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(again) is type(teacher)
    assert torch.equal(outcome(again, batch), outcome(small, batch))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(teacher).from_pretrained(tmp_path)


def test_sizes_are_written_down_where_only_dimensions_went(make: Make, tmp_path: Path) -> None:
    """Prevents a checkpoint that says nothing of its sizes, as the heads that are left are the first ones."""
    pruned = make("BertForSequenceClassification")
    with torch.no_grad():
        forget(dissect(pruned)[0].ffn, range(8))
    shrink(pruned).save_pretrained(tmp_path)
    assert sizes(prunelle.from_pretrained(str(tmp_path)))[0] == (2, 16)


def test_a_shrunk_checkpoint_shrinks_again(teacher: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
    """Prevents heads that are counted from the original model and looked up in the small one."""
    once = shrink(prune(teacher))
    once.save_pretrained(tmp_path)
    again = prunelle.from_pretrained(str(tmp_path))
    last = dissect(again)[-1]
    with torch.no_grad():
        forget(last.heads, [0])
        forget(last.ffn, range(8))
    twice = shrink(again)
    assert sizes(twice)[-1] == (1, 16)
    torch.testing.assert_close(outcome(twice, batch), outcome(again, batch), rtol=0, atol=1e-5)


def test_a_shrunk_model_trains(teacher: PreTrainedModel, batch: Batch) -> None:
    """Prevents parameters that the optimizer never sees, or that no gradient reaches."""
    small = shrink(prune(teacher)).train()
    labels = torch.tensor([0, 2]) if "SequenceClass" in type(small).__name__ else batch["input_ids"]
    small(**batch, labels=labels).loss.backward()
    stack = dissect(small)[-1].name
    grown = {name for name, parameter in small.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in small.named_parameters() if name.startswith(stack)} <= grown


def test_layers_of_a_shrunk_model_make_a_student(teacher: PreTrainedModel, batch: Batch) -> None:
    """Prevents a student of stock layers, into which the small ones do not fit."""
    small = shrink(prune(teacher))
    student = student_from_layers(small, [0, 1])
    assert sizes(student) == sizes(small)[:2]
    everything = student_from_layers(small, range(len(sizes(small))))
    assert torch.equal(outcome(everything, batch), outcome(small, batch))


def test_a_distilbert_of_a_shrunk_bert(make: Make, batch: Batch) -> None:
    small = shrink(prune(make("BertForMaskedLM")))
    student = distilbert_from_bert(small, range(5))
    torch.testing.assert_close(outcome(student, batch), outcome(small, batch), rtol=0, atol=1e-5)


def test_biases_of_gated_layers(make: Make, batch: Batch) -> None:
    """Prevents a gate's constant from being taken for zero: act(a) * b goes where both are constant."""
    model = prune(make("ModernBertForMaskedLM", mlp_bias=True, attention_bias=True))
    (up,) = dissect(model)[4].ffn.producers.values()
    with torch.no_grad():
        matrix(up)[dissect(model)[4].ffn.outputs(range(8))] = 0
        matrix(up)[8:16] = 0  # the first factor alone: these stay
    small = shrink(model)
    assert sizes(small)[4] == (2, 16)
    torch.testing.assert_close(outcome(small, batch), outcome(model, batch), rtol=0, atol=1e-5)


def test_dimensions_are_rounded_up_with_the_largest_of_the_rest(make: Make) -> None:
    """Prevents rounding that fills up with zeros where something is left to train."""
    model = make("BertForMaskedLM")
    layer = dissect(model)[0]
    (up,) = layer.ffn.producers.values()
    with torch.no_grad():
        forget(layer.ffn, range(11))
        matrix(up)[4] = 100.0
    kept = dissect(shrink(model))[0]
    assert kept.ffn.count == 16  # 13 are needed, 4 and two others fill it up
    (small_up,) = kept.ffn.producers.values()
    assert (matrix(small_up) == 100.0).all(1).sum() == 1
    assert dissect(shrink(model, round_to=1))[0].ffn.count == 13


def test_nothing_to_remove_leaves_a_stock_checkpoint(make: Make, batch: Batch, tmp_path: Path) -> None:
    """Prevents checkpoints that need this package for nothing."""
    model = make("BertForMaskedLM")
    shrink(model).save_pretrained(tmp_path)
    stock = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outcome(stock, batch), outcome(model, batch))


def test_text_is_generated_with_a_cache_whose_first_layer_is_empty(make: Make) -> None:
    """Prevents positions that start from 0 at every token, as the cache counts tokens by its first layer."""
    model = make("GPT2LMHeadModel")
    with torch.no_grad():
        forget(dissect(model)[0].heads, [0, 1])
    prompt = torch.tensor([[5, 9, 7]])
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    given = shrink(model).generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert given.tolist() == expected.tolist()


def test_the_trainer_saves_and_goes_on(make: Make, batch: Batch, tmp_path: Path) -> None:
    """Prevents a shape that is lost with the first checkpoint."""
    rows = [{name: values[0] for name, values in batch.items()} | {"labels": torch.tensor(1)}] * 4
    small = shrink(prune(make("BertForSequenceClassification")))
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(small, arguments, train_dataset=rows)
    trainer.train()
    again = prunelle.from_pretrained(str(tmp_path / "checkpoint-2"))
    assert torch.equal(outcome(again, batch), outcome(small.eval(), batch))
    first = prunelle.from_pretrained(str(tmp_path / "checkpoint-1"))
    transformers.Trainer(first, arguments, train_dataset=rows).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-1")
    assert torch.equal(outcome(first.eval(), batch), outcome(small, batch))


class _Masked(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0


@pytest.mark.parametrize(
    ("spoil", "options", "reason"),
    [
        (lambda model: None, {"round_to": 0}, "round_to is 0: it must be at least 1"),
        (
            lambda model: parametrize.register_parametrization(
                model.bert.encoder.layer[0].output.dense, "weight", _Masked()
            ),
            {},
            "bert.encoder.layer.0.output.dense carries a mask or a quantizer; bake the model first",
        ),
        (
            lambda model: model.bert.encoder.layer[1].attention.self.add_module("query_global", nn.Linear(16, 16)),
            {},
            "bert.encoder.layer.1 .* heads and feed-forward dimensions are not known",
        ),
    ],
    ids=["no multiple", "unbaked", "unknown projection"],
)
def test_what_cannot_be_shrunk_is_refused(make: Make, spoil: Any, options: Any, reason: str) -> None:
    model = make("BertForSequenceClassification")
    spoil(model)
    with pytest.raises(InputError, match=reason):
        shrink(model, **options)


def test_one_class_is_named(make: Make, tmp_path: Path) -> None:
    """Prevents a head drawn at random where the configuration says nothing, or another family's Auto class."""
    small = shrink(prune(make("BertForSequenceClassification")))
    small.save_pretrained(tmp_path)
    bare = prunelle.from_pretrained(str(tmp_path), transformers.AutoModel)
    assert type(bare) is transformers.BertModel
    assert sizes(bare) == sizes(small)
    with pytest.raises(InputError, match="is a bert, which AutoModelForSpeechSeq2Seq does not know"):
        prunelle.from_pretrained(str(tmp_path), transformers.AutoModelForSpeechSeq2Seq)
