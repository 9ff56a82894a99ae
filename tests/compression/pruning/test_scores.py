"""Scores that are more than a weight's size, against naive references."""

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression.anatomy import dissect
from prunelle.compression.pruning import CubicSchedule, OneShotSchedule, Pruning
from prunelle.errors import InputError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LABELS = torch.tensor([0, 1, 1])


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).double()


def batch(number: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(number))}


def backward(model: PreTrainedModel, number: int) -> None:
    nn.functional.cross_entropy(model(**batch(number)).logits, LABELS).backward()


@pytest.mark.parametrize("structure", ["weights", "rows", "heads"])
def test_taylor_is_the_running_mean_of_what_the_loss_would_change_by(structure: str) -> None:
    """Prevents importances of one batch alone, signs that cancel over time, and those that cannot cancel in a unit."""
    model, plain = tiny(), tiny()
    method = Pruning(CubicSchedule(0.5, 0.1, 0.3), "taylor", structure=structure)
    method.attach(model)
    method.step(0.0)
    expected: dict[str, Tensor] = {}
    for number in range(3):
        model.zero_grad()
        plain.zero_grad()
        backward(model, number)
        backward(plain, number)
        method.check_gradients()
        method.observe()
        changes = {n: (m.weight * m.weight.grad).detach() for n, m in plain.named_modules() if type(m) is nn.Linear}
        of_units = {n: change.flatten() if structure == "weights" else change.sum(1) for n, change in changes.items()}
        if structure == "heads":
            of_units = {
                f"{layer.name} heads": sum(changes[n].view(4, -1).sum(1) for n in layer.heads.producers)
                + changes[layer.heads.consumer[0]].view(16, 4, 4).sum((0, 2))
                for layer in dissect(plain)
            }
        expected = {n: 0.99 * expected.get(n, 0) + 0.01 * change.abs() for n, change in of_units.items()}
    for group in method.groups:
        torch.testing.assert_close(group.ranking().double(), expected[group.group.name], rtol=1e-5, atol=1e-9)


def test_one_shot_taylor_names_what_the_loss_does_not_see() -> None:
    """Prevents weights that go because nothing was ever found out about them."""
    model = tiny()
    method = Pruning(OneShotSchedule(0.5), "taylor")
    method.attach(model)

    def run(samples: int, after_batch: Any) -> None:
        model.bert.embeddings(**batch(0)).sum().backward()
        after_batch()

    with pytest.raises(InputError, match=r"scores of bert\.encoder\.layer\.0.* get no gradient"):
        method.calibrate(model, run)


def test_taylor_needs_no_parameters_and_survives_an_overflow() -> None:
    """Prevents one overflowing step in float16 from making all scores NaN for the rest of the run."""
    model = tiny()
    method = Pruning(CubicSchedule(0.5), "taylor")
    method.attach(model)
    assert not method.parameter_groups()
    backward(model, 0)
    originals = [group.modules[group.group.name].parametrizations.weight.original for group in method.groups]
    originals[0].grad[0, 0], originals[1].grad[0, 0] = math.inf, math.nan
    method.observe()
    assert all(group.ranking().isfinite().all() for group in method.groups)


def naive_gate(score: float, uniform: float | None) -> float:
    """Louizos et al., equations 10 and 11; without a uniform number the estimator for evaluation, equation 13."""
    logit = score if uniform is None else (math.log(uniform) - math.log(1 - uniform) + score) / (2 / 3)
    return min(1.0, max(0.0, (1.1 - -0.1) / (1 + math.exp(-logit)) + -0.1))


@pytest.mark.parametrize("structure", ["weights", "heads"])
def test_gates_are_hard_concrete(structure: str) -> None:
    """Prevents gates of another distribution, drawn anew in one optimizer step, or apart on the weights of one unit."""
    model = tiny().train()
    method = Pruning(CubicSchedule(0.5, 0.1, 0.3), "l0", structure=structure)
    method.attach(model)
    method.step(0.05)
    generator = torch.Generator().manual_seed(round(0.05 * 2**40))
    for group in method.groups:
        uniform = torch.rand(group.group.count, generator=generator).tolist()
        for is_training in (True, False):
            model.train(is_training)
            gates = [
                naive_gate(score, drawn if is_training else None)
                for score, drawn in zip(group.learned.flatten().tolist(), uniform, strict=True)
            ]
            for name, layout in group.group.layouts.items():
                weight = torch.ones_like(group.modules[name].weight)
                shown = group.masks[f"{name}.weight"](weight).view(layout.view)
                wanted = torch.tensor(gates).double().view(layout.units).expand(layout.view)
                torch.testing.assert_close(shown, wanted, rtol=1e-4, atol=1e-6)
    assert sum(gate == 1.0 for gate in gates) > 0


def test_a_gates_score_learns_through_the_gate() -> None:
    """Prevents gates that learn at kept weights alone, or weights that learn as if their gates were open."""
    model = tiny().train()
    method = Pruning(CubicSchedule(0.5, 0.0, 0.3), "l0", ranking="tensor")
    method.attach(model)
    method.step(0.3)
    (group, *_) = method.groups
    (mask,) = group.masks.values()
    weight, outward = torch.randn(2, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    weight.requires_grad_()
    (mask(weight) * outward).sum().backward()
    scores = group.learned.detach().double().requires_grad_()
    gates = (((scores + mask.noise) / (2 / 3)).sigmoid() * 1.2 - 0.1).clamp(0, 1)
    (gates * weight.detach() * outward).sum().backward()
    torch.testing.assert_close(group.learned.grad.double(), scores.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight.grad, (outward * mask.mask * gates.detach()), rtol=1e-4, atol=1e-6)
    assert 0 < int(mask.mask.sum()) < mask.mask.numel()


def test_the_penalty_of_gates_is_how_many_are_open() -> None:
    """Prevents a penalty on the mean gate, which says nothing about how many weights are left."""
    method = Pruning(CubicSchedule(0.5), "l0", score_penalty=3.0)
    method.attach(tiny())
    scores = torch.cat([group.learned.detach().flatten() for group in method.groups]).double()
    drawn = torch.rand(200, scores.numel(), dtype=torch.double, generator=torch.Generator().manual_seed(0)).logit()
    is_open = ((drawn + scores) / (2 / 3)).sigmoid() * 1.2 - 0.1 > 0
    assert method.penalty().item() == pytest.approx(3 * is_open.double().mean().item(), rel=1e-3)


def test_gates_are_open_once_frozen_and_when_resumed_so() -> None:
    """Prevents kept weights that are scaled, or closed, in the model that comes out."""
    method: Any = Pruning(CubicSchedule(0.5, 0.1, 0.3), "l0", ranking="tensor")
    model = tiny().train()
    method.attach(model)
    resumed, other = copy.deepcopy(method), Pruning(CubicSchedule(0.5, 0.1, 0.3), "l0", ranking="tensor")
    method.step(0.7)
    for group in method.groups:
        shown = group.masks[f"{group.group.name}.weight"](torch.ones_like(group.modules[group.group.name].weight))
        assert sorted(shown.unique().tolist()) == [0.0, 1.0]
    assert (method.penalty(), resumed.penalty() > 0) == (0.0, True)
    other.attach(tiny())
    other.load_state_dict(method.state_dict())
    assert all(mask.frozen for mask in other.masks.values())


def padded(number: int) -> dict[str, Tensor]:
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    return batch(number) | {"attention_mask": mask}


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, n_inner=24)
    return transformers.GPT2LMHeadModel(config).double().eval()


@pytest.mark.parametrize("make", [lambda: tiny().eval(), gpt2], ids=["Bert", "GPT2"])
def test_wanda_is_weight_times_norm_of_input_row_by_row(make: Any) -> None:
    """Prevents norms of padding, of one batch alone, or laid along the outputs; and rows of unequal density."""
    model, plain = make(), make()
    seen: dict[str, list[Tensor]] = {}
    method = Pruning(OneShotSchedule(0.3), "wanda")
    method.attach(model)
    for group in method.groups:
        name = group.group.name
        plain.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, []).append(inputs[0])
        )
    with pytest.raises(RuntimeError, match="call calibrate before the first step"):
        method.step(0.0)

    def run(samples: int, after_batch: Any) -> None:
        for number in range(2):
            model(**padded(number))

    method.calibrate(model, run)
    method.step(0.0)
    method.finish()
    for number in range(2):
        plain(**padded(number))
    for group in method.groups:
        module = plain.get_submodule(group.group.name)
        weight = module.weight if type(module) is nn.Linear else module.weight.T
        shown = group.masks[f"{group.group.name}.weight"](torch.ones_like(module.weight))
        shown = shown if type(module) is nn.Linear else shown.T
        squares = torch.zeros(weight.shape[1], dtype=torch.double)
        for inputs in seen[group.group.name]:
            for example, length in zip(inputs.detach(), (7, 4, 2), strict=True):
                for token in example[:length]:
                    squares += token**2
        for row, kept in zip(weight.detach().abs() * squares.sqrt(), shown, strict=True):
            count = round(0.3 * len(row))
            assert sorted(row.argsort(descending=True)[:count].tolist()) == kept.nonzero().flatten().tolist()


@pytest.mark.parametrize("structure", ["4x4", "heads", "ffn"])
def test_wanda_of_a_unit_is_the_mean_over_its_weights(structure: str) -> None:
    """Prevents norms that lie along the wrong side of one of a unit's matrices, and sums that favour large ones."""
    model, plain = tiny().eval(), tiny().eval()
    method = Pruning(OneShotSchedule(0.5), "wanda", structure=structure)
    method.attach(model)
    method.calibrate(model, lambda samples, after_batch: model(**batch(0)))
    scores: dict[str, Tensor] = {}
    for name, module in plain.bert.encoder.named_modules(prefix="bert.encoder"):
        if type(module) is nn.Linear:
            module.register_forward_hook(
                lambda module, inputs, output, name=name: scores.update(
                    {name: module.weight.abs() * inputs[0].flatten(0, 1).square().sum(0).sqrt()}
                )
            )
    plain(**batch(0))
    if structure == "4x4":
        expected = {name: each.view(len(each) // 4, 4, -1, 4).mean((1, 3)) for name, each in scores.items()}
    else:
        expected = {}
        for layer in dissect(plain):
            units = getattr(layer, structure)
            parts = [scores[name].view(units.count, -1) for name in units.producers]
            parts.append(scores[units.consumer[0]].T.reshape(units.count, -1))
            expected[f"{layer.name} {structure}"] = torch.cat(parts, 1).mean(1)
    assert len(expected) == len(method.groups)
    for group in method.groups:
        torch.testing.assert_close(group.ranking().double(), expected[group.group.name].flatten(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_wanda_leaves_out_of_encoder_and_decoder_each_its_own_padding(name: str) -> None:
    """Prevents the padding of the source from being cut out of the target, where both are as long."""
    sizes = {"vocab_size": 40, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    layers = {"num_layers": 1, "num_heads": 2, "d_ff": 24, "d_kv": 8, "is_encoder_decoder": True}
    for side in ("encoder", "decoder"):
        layers |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}ForConditionalGeneration")
    model = model_class(model_class.config_class(**sizes, **layers, dropout=0.0)).double().eval()
    ends = ("SelfAttention.q", "EncDecAttention.k", ".wi", "self_attn.q_proj", "encoder_attn.k_proj", "fc1")
    method = Pruning(OneShotSchedule(0.5), "wanda", patterns=["*block*" if name == "T5" else "*layers*"])
    modules = {n: module for n, module in model.named_modules() if n.endswith(ends)}
    seen: dict[str, Tensor] = {}
    for n, module in modules.items():
        module.register_forward_pre_hook(lambda module, inputs, n=n: seen.update({n: inputs[0].detach()}))
    method.attach(model)
    of_target = torch.tensor([[1] * 5 + [0] * 2] * 3)
    others = {"decoder_input_ids": batch(1)["input_ids"], "decoder_attention_mask": of_target}
    method.calibrate(model, lambda samples, after_batch: model(**padded(0), **others))
    assert len(modules) == 5
    for n in modules:
        reads_source = ".encoder." in f".{n}" or "EncDec" in n or "encoder_attn" in n
        mask = padded(0)["attention_mask"] if reads_source else of_target
        expected = seen[n][mask.bool()].square().sum(0).sqrt()
        torch.testing.assert_close(method.masks[f"{n}.weight"].norms.double(), expected, rtol=1e-5, atol=0)


def test_head_importance_is_the_gradient_of_a_gate_example_by_example() -> None:
    """Prevents signs that cancel between examples, and layers whose gradients are larger from keeping all heads."""
    model, plain = tiny().eval(), tiny().eval()
    method = Pruning(OneShotSchedule(0.5), "head_importance", structure="heads", ranking="global")
    method.attach(model)

    def run(samples: int, after_batch: Any) -> None:
        for number in range(2):
            nn.functional.cross_entropy(model(**padded(number)).logits, LABELS).backward()

    method.calibrate(model, run)
    gates = [torch.ones(4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    for layer, gate in zip(plain.bert.encoder.layer, gates, strict=True):
        layer.attention.output.dense.register_forward_pre_hook(
            lambda module, inputs, gate=gate: (inputs[0] * gate.repeat_interleave(4),)
        )
    expected = torch.zeros(2, 4, dtype=torch.double)
    for number in range(2):
        for example in range(3):
            one = {name: values[example : example + 1] for name, values in padded(number).items()}
            loss = nn.functional.cross_entropy(plain(**one).logits, LABELS[example : example + 1])
            expected += torch.stack(torch.autograd.grad(loss, gates)).abs()
    expected /= expected.square().sum(1, keepdim=True).sqrt()
    found = torch.stack([group.ranking() for group in method.groups])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("score", "structure"), [("wanda", "weights"), ("head_importance", "heads")])
def test_what_no_example_reaches_is_named(score: Any, structure: str) -> None:
    """Prevents a traceback, or heads that go because they were never seen."""
    model = tiny().eval()
    method = Pruning(OneShotSchedule(0.5), score, structure=structure)
    method.attach(model)

    def run(samples: int, after_batch: Any) -> None:
        model.bert.encoder.layer = model.bert.encoder.layer[:1]
        nn.functional.cross_entropy(model(**padded(0)).logits, LABELS).backward()

    with pytest.raises(InputError, match=r"no example reaches bert\.encoder\.layer\.1.*: exclude it"):
        method.calibrate(model, run)
