"""What every student made from a teacher obeys, whatever the architecture and the head."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from prunelle.compression import distilbert_from_bert, every_second_layer, find_layers, student_from_layers
from prunelle.errors import InputError

Make = Callable[..., PreTrainedModel]
Batch = dict[str, torch.Tensor]

KEPT = [0, 2, 3]


def logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def labels(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return torch.tensor([0, 2]) if "SequenceClassification" in type(model).__name__ else batch["input_ids"]


def trained_parameters(model: PreTrainedModel, batch: Batch) -> set[str]:
    """The names of the parameters that a training step's gradient reaches."""
    model.train()
    model.zero_grad()
    model(**batch, labels=labels(model, batch)).loss.backward()
    model.eval()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def in_student(name: str, stack: str, kept: list[int]) -> str | None:
    """What the teacher's parameter is called in the student; None for one of a layer left out."""
    if not name.startswith(f"{stack}."):
        return name
    layer, rest = name.removeprefix(f"{stack}.").split(".", maxsplit=1)
    return f"{stack}.{kept.index(int(layer))}.{rest}" if int(layer) in kept else None


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Through a checkpoint and the stock Auto class, as a user would."""
    name = type(model).__name__
    head = next(
        kind
        for kind in ("SequenceClassification", "MaskedLM", "TokenClassification", "CausalLM")
        if kind in name.replace("LMHeadModel", "CausalLM")
    )
    model.save_pretrained(folder)
    again, report = getattr(transformers, f"AutoModelFor{head}").from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(again) is type(model)
    return again


def test_all_layers_give_the_teachers_logits(teacher: PreTrainedModel, batch: Batch) -> None:
    """One tensor not copied, or copied to another place, and distillation starts from a damaged student."""
    student = student_from_layers(teacher, range(5))
    assert torch.equal(logits(student, batch), logits(teacher, batch))


def test_kept_weights_are_the_teachers(teacher: PreTrainedModel) -> None:
    """A layer off by one still trains, only worse."""
    stack = find_layers(teacher).name
    expected = {in_student(name, stack, KEPT): weight for name, weight in teacher.state_dict().items()}
    expected.pop(None, None)
    student = student_from_layers(teacher, KEPT)
    assert student.config.num_hidden_layers == len(find_layers(student).modules) == 3
    assert student.state_dict().keys() == expected.keys()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_a_subset_computes_what_its_layers_did_in_the_teacher(teacher: PreTrainedModel, batch: Batch) -> None:
    """Equal weights do not make equal layers: windows, norms and scales depend on a layer's place too.

    The reference is the teacher itself, with the layers left out taken from its list.
    """
    student = student_from_layers(teacher, KEPT)
    reference = copy.deepcopy(teacher)
    stack = find_layers(reference)
    parent, attribute = stack.name.rsplit(".", 1)
    setattr(
        reference.get_submodule(parent),
        attribute,
        nn.ModuleList(copy.deepcopy(stack.modules[i]) for i in KEPT),
    )
    if isinstance(reference.config, transformers.ModernBertConfig):  # its forward asks the config, by place
        reference.config.layer_types = [reference.config.layer_types[i] for i in KEPT]
    reference.config.use_cache = False  # its layers still claim the cache slots of their old places
    assert torch.equal(logits(student, batch), logits(reference, batch))
    assert not torch.allclose(logits(student, batch), logits(teacher, batch), atol=1e-2)


def test_bert_against_a_forward_by_hand(make: Make, batch: Batch) -> None:
    """The plainest reference: embeddings, the kept layers one by one, pooler, classifier."""
    teacher = make("BertForSequenceClassification")
    student = student_from_layers(teacher, [3, 0])  # the order given, not the ascending one
    with torch.no_grad():
        hidden = teacher.bert.embeddings(batch["input_ids"])
        mask = (1 - batch["attention_mask"][:, None, None, :]) * torch.finfo(torch.float32).min
        for layer in (3, 0):
            out = teacher.bert.encoder.layer[layer](hidden, mask)
            hidden = out[0] if isinstance(out, tuple) else out
        expected = teacher.classifier(teacher.bert.pooler(hidden))
    torch.testing.assert_close(logits(student, batch), expected, rtol=1e-5, atol=1e-5)


def test_stock_classes_reload_it(teacher: PreTrainedModel, batch: Batch, tmp_path: Path) -> None:
    """A config that describes another model than the one trained shows only after the run, on loading."""
    student = student_from_layers(teacher, KEPT)
    assert torch.equal(logits(reloaded(student, tmp_path), batch), logits(student, batch))


def test_the_teacher_stays_as_it_was(teacher: PreTrainedModel, batch: Batch) -> None:
    """A tensor or a config shared with the student would make the teacher learn along with it."""
    weights, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    before = logits(teacher, batch)
    for parameter in teacher.parameters():  # as trainers freeze it: the student must not inherit that
        parameter.requires_grad_(False)

    student = student_from_layers(teacher, KEPT)
    shared = {t.data_ptr() for t in student.state_dict().values()} & {
        t.data_ptr() for t in teacher.state_dict().values()
    }
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    reached = trained_parameters(student, batch)
    optimizer.step()

    assert not shared
    assert reached
    assert not torch.equal(logits(student, batch), before)
    assert torch.equal(logits(teacher, batch), before)
    assert teacher.config.to_dict() == config
    assert all(torch.equal(weight, weights[name]) for name, weight in teacher.state_dict().items())


def test_gradient_reaches_what_it_reaches_in_the_teacher(teacher: PreTrainedModel, batch: Batch) -> None:
    """A parameter cut off from the loss stays at the teacher's value for the whole run."""
    student = student_from_layers(teacher, KEPT)
    stack = find_layers(teacher).name
    expected = {in_student(name, stack, KEPT) for name in trained_parameters(teacher, batch)} - {None}
    assert trained_parameters(student, batch) == expected


def test_tied_embeddings_stay_tied(teacher: PreTrainedModel) -> None:
    """An untied copy of the vocabulary's matrix would double the parameters, and train apart."""
    student = student_from_layers(teacher, KEPT)
    teacher_head, head = teacher.get_output_embeddings(), student.get_output_embeddings()
    if teacher_head is None:
        assert head is None
    else:
        assert teacher_head.weight is teacher.get_input_embeddings().weight
        assert head.weight is student.get_input_embeddings().weight


def test_untied_embeddings_stay_untied(make: Make, batch: Batch, tmp_path: Path) -> None:
    """Even where the config says tied: transformers loads such a checkpoint untied, with a warning.

    Tied anew, the student would have one of the two matrices in both places.
    """
    teacher = make("GPT2LMHeadModel")
    teacher.lm_head.weight = nn.Parameter(teacher.lm_head.weight.detach() + 1)
    student = student_from_layers(teacher, range(5))
    assert teacher.config.tie_word_embeddings
    assert not student.config.tie_word_embeddings
    assert torch.equal(logits(student, batch), logits(teacher, batch))
    assert torch.equal(logits(reloaded(student, tmp_path), batch), logits(student, batch))


def test_the_students_values_do_not_depend_on_the_seed(teacher: PreTrainedModel) -> None:
    """Any tensor left at its random initialization would differ from seed to seed, and nothing else would."""
    torch.manual_seed(1)
    one = student_from_layers(teacher, KEPT).state_dict()
    torch.manual_seed(2)
    two = student_from_layers(teacher, KEPT).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dtype_and_attention_are_the_teachers(make: Make, dtype: torch.dtype, attention: str) -> None:
    """A student in float32 beside a bfloat16 teacher costs twice the memory, and nobody asked for it."""
    teacher = make("ModernBertForMaskedLM", attn_implementation=attention).to(dtype)
    student = student_from_layers(teacher, KEPT)
    assert {p.dtype for p in student.parameters()} == {dtype}
    assert student.config._attn_implementation == attention
    assert not student.training


def test_modernbert_layers_keep_their_kind_of_attention(make: Make, tmp_path: Path) -> None:
    """By its place, layer 3 (global) would become local in the student, and layer 2 (local) stay so."""
    teacher = make("ModernBertForMaskedLM")
    assert [kind[:4] for kind in teacher.config.layer_types] == ["full", "slid", "slid", "full", "slid"]
    student = student_from_layers(teacher, [0, 3, 4])
    again = reloaded(student, tmp_path)
    for model in (student, again):
        assert [layer.attn.sliding_window for layer in model.model.layers] == [None, None, 3]
        assert [kind[:4] for kind in model.config.layer_types] == ["full", "full", "slid"]
        assert not hasattr(model.config, "global_attn_every_n_layers")


@pytest.mark.parametrize("layers", [[1, 2], [3, 0]])
def test_modernbert_must_begin_with_layer_0(make: Make, layers: list[int]) -> None:
    """The stock class gives the first layer no attention norm: another one put there would lose its own."""
    with pytest.raises(InputError, match=r"attn_norm.* keep layer 0, as the first$"):
        student_from_layers(make("ModernBertForMaskedLM"), layers)


def test_gpt2_scales_that_depend_on_the_layer_are_seen(make: Make) -> None:
    """With this option GPT-2 divides attention by the layer's number, which no weight shows."""
    teacher = make("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True)
    student_from_layers(teacher, [0, 1])
    with pytest.raises(InputError, match=r"layer 2 would not .* place 1 .*attn\.scaling.*leave this layer out$"):
        student_from_layers(teacher, [0, 2])


def test_gpt2_generates_with_its_cache(make: Make, batch: Batch) -> None:
    """Layers that kept the index of their old place would look for cache slots that do not exist."""
    teacher = make("GPT2LMHeadModel")
    teacher.generation_config.max_new_tokens = 6
    student = student_from_layers(teacher, [1, 3, 4])
    prompt = batch["input_ids"][:1]
    mask = torch.ones_like(prompt)
    cached = student.generate(prompt, attention_mask=mask, do_sample=False, use_cache=True)
    plain = student.generate(prompt, attention_mask=mask, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    assert student.generation_config.max_new_tokens == 6
    assert student.generation_config is not teacher.generation_config


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no student layers given; name at least one of 0 to 4"),
        ([0, 5], "student layer 5 does not exist: the teacher's are 0 to 4"),
        ([-1], "student layer -1 does not exist: the teacher's are 0 to 4"),
        ([0, 2, 0], "student layer 0 is given more than once"),
    ],
)
def test_layers_that_make_no_student_are_refused(make: Make, layers: list[int], message: str) -> None:
    """Python itself would take -1 for the last layer, and a layer given twice for two."""
    with pytest.raises(InputError, match=message):
        student_from_layers(make("BertForMaskedLM"), layers)


@pytest.mark.parametrize("name", ["cls.predictions.transform.dense", "bert.encoder.layer.0.output.dense"])
def test_a_teacher_with_masks_attached_is_refused(make: Make, name: str) -> None:
    """Its state dict holds the weights from before the masks: a student of those is not the teacher's."""
    teacher = make("BertForMaskedLM")
    nn.utils.parametrize.register_parametrization(teacher.get_submodule(name), "weight", nn.ReLU())
    with pytest.raises(InputError, match=f"teacher's {name} carries a mask .*; bake the teacher first"):
        student_from_layers(teacher, KEPT)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (1, [0]),
        (2, [0]),
        (3, [0, 2]),
        (4, [0, 3]),
        (5, [0, 2, 4]),
        (6, [0, 2, 5]),
        (7, [0, 2, 4, 6]),
        (12, [0, 2, 4, 7, 9, 11]),
        (24, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
    ],
)
def test_every_second_layer(depth: int, layers: list[int]) -> None:
    """12 is the published choice; the last layer, which the head was trained on, stays wherever two do."""
    assert every_second_layer(depth) == layers


def bert_with_a_strong_token_type(make: Make, name: str, **config: Any) -> PreTrainedModel:
    teacher = make(name, **config)
    with torch.no_grad():
        teacher.base_model.embeddings.token_type_embeddings.weight.mul_(5)
    return teacher


@pytest.mark.parametrize(
    "name", ["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"]
)
def test_distilbert_of_all_layers_has_berts_hidden_states(make: Make, batch: Batch, name: str) -> None:
    """Weights under the wrong name, or the token type lost, only shows as a student that learns slowly."""
    teacher = bert_with_a_strong_token_type(make, name)
    student = distilbert_from_bert(teacher, range(5))
    with torch.no_grad():
        expected = teacher(**batch, output_hidden_states=True).hidden_states
        hidden = student(**batch, output_hidden_states=True).hidden_states
    assert len(hidden) == len(expected) == 6
    for ours, berts in zip(hidden, expected, strict=True):
        torch.testing.assert_close(ours, berts, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering"])
def test_distilbert_of_all_layers_has_berts_logits(make: Make, batch: Batch, name: str) -> None:
    """The heads that both have are carried over whole: bias, norm and activation too."""
    teacher = bert_with_a_strong_token_type(make, name, hidden_act="gelu_new", num_labels=2)
    student = distilbert_from_bert(teacher, range(5))
    with torch.no_grad():
        expected, ours = teacher(**batch), student(**batch)
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMultipleChoice"])
def test_distilberts_classifier_is_berts_with_relu(make: Make, batch: Batch, name: str) -> None:
    """The one known difference from the teacher, and the only one."""
    teacher = bert_with_a_strong_token_type(make, name)
    student = distilbert_from_bert(teacher, range(5))
    if name == "BertForMultipleChoice":
        batch = {key: value[None] for key, value in batch.items()}
    teacher.bert.pooler.activation = nn.ReLU()
    torch.testing.assert_close(logits(student, batch), logits(teacher, batch), rtol=0, atol=2e-5)


def test_distilbert_takes_the_layers_given(make: Make, batch: Batch) -> None:
    """DistilBERT of some layers equals DistilBERT of the BERT that has only those."""
    teacher = bert_with_a_strong_token_type(make, "BertForMaskedLM")
    expected = logits(student_from_layers(teacher, [1, 4]), batch)
    torch.testing.assert_close(logits(distilbert_from_bert(teacher, [1, 4]), batch), expected, rtol=0, atol=2e-5)
    default = distilbert_from_bert(teacher)
    expected = logits(student_from_layers(teacher, [0, 2, 4]), batch)
    torch.testing.assert_close(logits(default, batch), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_distilbert_is_a_student_like_any_other(make: Make, batch: Batch, name: str, tmp_path: Path) -> None:
    """Stays tied, reloads with stock classes, trains in every parameter, leaves the teacher alone."""
    teacher = make(name)
    before = copy.deepcopy(teacher.state_dict())
    student = distilbert_from_bert(teacher)
    assert not student.training
    if name == "BertForMaskedLM":
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert torch.equal(logits(reloaded(student, tmp_path), batch), logits(student, batch))

    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    reached = trained_parameters(student, batch)
    optimizer.step()
    assert reached == {parameter for parameter, _ in student.named_parameters()}
    assert all(torch.equal(weight, before[key]) for key, weight in teacher.state_dict().items())


def test_distilberts_config_is_the_teachers(make: Make) -> None:
    """Labels renamed to LABEL_0 and a default dropout are found late, or never."""
    teacher = make(
        "BertForSequenceClassification",
        num_labels=2,
        id2label={0: "no", 1: "yes"},
        label2id={"no": 0, "yes": 1},
        problem_type="single_label_classification",
        hidden_dropout_prob=0.25,
        attention_probs_dropout_prob=0.35,
        classifier_dropout=0.0,
        hidden_act="relu",
        attn_implementation="eager",
    ).to(torch.bfloat16)
    student = distilbert_from_bert(teacher)
    config = student.config
    assert (config.id2label, config.label2id) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    assert config.problem_type == "single_label_classification"
    assert (config.dropout, config.attention_dropout, config.seq_classif_dropout) == (0.25, 0.35, 0.0)
    assert (config.activation, config.pad_token_id, config.sinusoidal_pos_embds) == ("relu", 1, False)
    assert (config._attn_implementation, student.dtype) == ("eager", torch.bfloat16)
    assert distilbert_from_bert(make("BertForMaskedLM", hidden_dropout_prob=0.3)).config.seq_classif_dropout == 0.3


def test_an_epsilon_that_distilbert_cannot_hold_is_said(make: Make) -> None:
    """Set on the modules it would hold for this run, and be gone on loading."""
    with pytest.warns(UserWarning, match=r"layer_norm_eps is 1e-05"):
        distilbert_from_bert(make("BertForMaskedLM", layer_norm_eps=1e-5))


def test_a_distilbert_of_anything_but_a_bert_encoder_is_refused(make: Make) -> None:
    """RoBERTa's names are almost BERT's, its positions are not; a decoder's mask has no place."""
    with pytest.raises(InputError, match="RobertaForMaskedLM: the teacher must be one of BertModel, "):
        distilbert_from_bert(make("RobertaForMaskedLM"))
    with pytest.raises(InputError, match="is_decoder"):
        distilbert_from_bert(make("BertForMaskedLM", is_decoder=True))
