"""Masks against naive references, in a hand-written loop: no trainer is needed."""

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelle.compression import bake
from prunelle.compression.pruning import (
    CubicSchedule,
    IterativeSchedule,
    LearnedMask,
    Pruning,
    Rewinding,
    density_by_weight,
    find_prunable,
    selection,
)
from prunelle.compression.pruning.selection import (
    SAMPLED,
    STRIDE,
    keep_highest,
    keep_highest_of_all,
    keep_highest_of_each,
)
from prunelle.compression.pruning.structures import Axis, Layout
from prunelle.errors import InputError

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "num_labels": 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "DistilBert": {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_heads": 2, "n_layers": 2, "num_labels": 3},
    "ModernBert": {**SIZES, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    "GPT2": {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24}
    | {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "num_labels": 3},
}
# Linear modules in a layer, and their weights.
LINEAR = {"Bert": 6, "Roberta": 6, "DistilBert": 6, "ModernBert": 4, "GPT2": 4}


def tiny(name: str = "Bert") -> PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}ForSequenceClassification")
    return model_class(model_class.config_class(**CONFIGS[name], initializer_range=0.3)).eval()


BATCH = {"input_ids": torch.arange(4, 28).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


def train(model: PreTrainedModel, method: Pruning, steps: int = 10, rate: float = 1e-2) -> list[float]:
    """A loop as in the docstring of `CompressionMethod`; the density after every step."""
    method.attach(model)
    groups = method.parameter_groups()
    apart = {id(parameter) for group in groups for parameter in group["params"]}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in apart]
    optimizer = torch.optim.AdamW([{"params": weights}, *groups], lr=rate)
    method.start(steps)
    method.step(0.0)
    densities = []
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(**BATCH).logits, torch.tensor([0, 2])) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        method.check_gradients()
        method.observe()
        optimizer.step()
        method.step((step + 1) / steps)
        densities.append(method.metrics()["density"])
    method.finish()
    return densities


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal"])
def test_the_highest_are_counted_out(
    kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a threshold that keeps all of many equal scores (with scores from zero, that is all of them), and what
    is done on a GPU from never being tried."""
    if device == "gpu":
        monkeypatch.setattr(selection, "_on_cpu", selection._on_gpu)  # which computes anywhere
    torch.manual_seed(0)
    scores = {"distinct": torch.randn(7, 11), "ties": torch.randint(0, 4, (7, 11)), "equal": torch.zeros(7, 11)}[kind]
    scores = scores.to(dtype)
    for count in (0, 1, 20, 76, 77):
        order = sorted(range(77), key=lambda place: (-scores.flatten()[place].item(), place))
        expected = torch.zeros(77, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(keep_highest(scores, count), expected.view(7, 11))
        assert torch.equal(torch.cat(keep_highest_of_all(scores.split([3, 4]), count)), expected.view(7, 11))


@pytest.mark.parametrize("kind", ["distinct", "ties", "sample misleads"])
def test_the_highest_of_many_are_counted_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a threshold that is estimated from a sample, and counts that depend on the number of threads."""
    torch.manual_seed(0)
    scores = {
        "distinct": torch.randn(SAMPLED + 5),
        "ties": torch.randint(0, 9, (SAMPLED + 5,)).float(),
        "sample misleads": torch.randn(SAMPLED + 5) - 9 * (torch.arange(SAMPLED + 5) % STRIDE == 0),
    }[kind]
    sizes = [STRIDE, 7 * STRIDE, SAMPLED + 5 - 8 * STRIDE]
    order = (-scores.double()).argsort(stable=True)
    for threads, count in ((1, 1), (2, SAMPLED // 7), (1, SAMPLED // 2), (2, SAMPLED + 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        expected = torch.zeros_like(scores, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(torch.cat(keep_highest_of_all(scores.split(sizes), count)), expected)
    parts, counts = scores[:9000].split(3000), [3000, 1, 0]
    both = zip(keep_highest_of_each(parts, counts), map(keep_highest, parts, counts), strict=True)
    assert all(torch.equal(one, other) for one, other in both)


def test_the_schedule_is_the_published_cubic() -> None:
    """Prevents a ramp that ends beside its target, or that begins in the warm-up."""
    schedule = CubicSchedule(0.15, 0.1, 0.3)
    assert [schedule.at(progress) for progress in (0.0, 0.05, 0.1)] == [1.0, 1.0, 1.0]
    # Zhu and Gupta, equation 1, for sparsities: s = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3
    assert schedule.at(0.4) == pytest.approx(1 - (0.85 + (0 - 0.85) * (1 - 0.3 / 0.6) ** 3))
    for steps in (7, 10, 30, 1085):
        densities = [schedule.at(step / steps) for step in range(steps + 1)]
        assert densities == sorted(densities, reverse=True)
        assert densities[math.ceil(0.7 * steps) :] == [0.15] * (steps + 1 - math.ceil(0.7 * steps))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"density": 0.0}, r"a density of 0\.0 must be above 0"),
        ({"density": 1.5}, r"a density of 1\.5"),
        ({"density": math.nan}, r"a density of nan"),
        ({"density": 0.5, "warmup": -0.1}, r"a warmup of -0\.1"),
        ({"density": 0.5, "cooldown": 1.0}, r"a cooldown of 1\.0"),
        ({"density": 0.5, "warmup": 0.5, "cooldown": 0.5}, r"0\.5 and .* 0\.5 leave nothing"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(values: dict[str, float], expected: str) -> None:
    """Prevents a run that keeps everything, or nothing, because of a typing error."""
    with pytest.raises(InputError, match=expected):
        CubicSchedule(**values)


def test_a_run_too_short_is_refused_with_its_numbers() -> None:
    """Prevents a run that ends before its density is reached, or that never trains with the last masks."""
    CubicSchedule(0.5, 0.1, 0.3).check(4)
    CubicSchedule(0.5, 0.0, 0.0).check(2)
    with pytest.raises(InputError, match=r"has 3 optimizer steps.* from step 0\.3 to step 2\.1"):
        CubicSchedule(0.5, 0.1, 0.3).check(3)
    with pytest.raises(InputError, match=r"has 10 optimizer steps.* from step 6 to step 7 "):
        CubicSchedule(0.5, 0.6, 0.3).check(10)


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_modules_of_the_layers_are_found(name: str) -> None:
    """Prevents an architecture whose linear layers are another class (GPT-2's) from being left dense in silence."""
    model = tiny(name)
    found = find_prunable(model)
    assert len(found) == 2 * LINEAR[name]
    matrices = [n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and ".wte" not in n]
    outside = [n for n in matrices if n.removesuffix(".weight") not in found]
    assert all(any(word in n for word in ("class", "score", "pooler", "head", "wpe")) for n in outside), outside


def test_layers_of_encoder_and_decoder_are_found() -> None:
    """Prevents an encoder-decoder that is refused, or of which one half is left dense."""
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_layers=2, num_decoder_layers=1))
    found = find_prunable(model)
    assert len(found) == 2 * 6 + 10
    assert "lm_head" not in found


def test_layers_that_are_not_found_are_to_be_named() -> None:
    """Prevents an error that says what is wrong, and not what to do."""
    sizes = {"vocab_size": 40, "embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2}
    model = transformers.AlbertModel(transformers.AlbertConfig(**sizes, intermediate_size=24))
    with pytest.raises(InputError, match=r"AlbertModel has no list of 12 layers .* or name the .*--pruned_modules"):
        find_prunable(model)
    assert len(find_prunable(model, ["*.albert_layers.*"])) == 6


def test_patterns_choose_and_exclude() -> None:
    """Prevents a misspelt pattern from leaving a module dense, and a weight from being masked in one of two places."""
    model = tiny()
    assert list(find_prunable(model, ["classifier"])) == ["classifier"]
    assert len(find_prunable(model, ["*.attention.*"], ["*.1.*"])) == 4
    assert len(find_prunable(model, excluded=["*.query"])) == 10
    for patterns, excluded in ((["*.atention.*"], []), ([], ["*.qeury"])):
        with pytest.raises(InputError, match=r"matches none of the 14 modules"):
            find_prunable(model, patterns, excluded)
    with pytest.raises(InputError, match="no linear module"):
        find_prunable(model, ["*"], ["*"])
    tied = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIGS["GPT2"]))
    with pytest.raises(InputError, match="share a weight"):
        find_prunable(tied, ["lm_head"])


def naive_masks(scores: dict[str, Tensor], density: float, ranking: str) -> dict[str, Tensor]:
    """By sorting, in float64."""

    def lowest_kept(score: Tensor) -> Tensor:
        return score.double().flatten().sort(descending=True).values[round(density * score.numel()) - 1]

    together = torch.cat([score.flatten() for score in scores.values()])
    return {
        name: score.double() >= lowest_kept(score if ranking == "tensor" else together)
        for name, score in scores.items()
    }


@pytest.mark.parametrize("ranking", ["tensor", "global"])
@pytest.mark.parametrize("score", ["magnitude", "movement", "soft_movement", "random"])
def test_masks_are_those_of_the_naive_reference(score: Any, ranking: Any) -> None:
    """Prevents masks that belong to other scores, to another module or to the step before."""
    model = tiny()
    method = Pruning(CubicSchedule(0.3, 0.0, 0.0), score, ranking=ranking, seed=3)
    method.attach(model)
    with torch.no_grad():
        for mask in method.masks.values():
            if isinstance(mask, LearnedMask):
                mask.scores.copy_(torch.randn_like(mask.scores))
    method.step(0.4)
    scores = {}
    for name, mask in method.masks.items():
        weight = model.get_submodule(name.removesuffix(".weight")).parametrizations.weight.original
        scores[name] = weight.abs() if score == "magnitude" else mask.scores
    for name, expected in naive_masks(scores, method.schedule.at(0.4), ranking).items():
        assert torch.equal(method.masks[name].mask.bool(), expected)
    assert method.metrics()["density"] == pytest.approx(method.schedule.at(0.4), abs=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("structure", ["weights", "heads", "layers"])
@pytest.mark.parametrize("score", ["movement", "soft_movement", "l0", "taylor"])
def test_a_gpu_is_not_waited_for(score: Any, structure: str) -> None:
    """Prevents masks that stop the host at every optimizer step until the GPU has done all that was asked of it."""
    model = tiny().cuda()
    method = Pruning(CubicSchedule(0.5, 0.0, 0.3), score, structure=structure)
    method.attach(model)
    nn.functional.cross_entropy(
        model(**{name: tensor.cuda() for name, tensor in BATCH.items()}).logits, torch.tensor([0, 2], device="cuda")
    ).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for progress in (0.0, 0.3, 0.6, 0.7):
            method.penalty()
            method.observe()
            method.step(progress)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert method.frozen


def test_a_score_gets_the_gradient_of_movement() -> None:
    """Prevents scores that learn at kept weights alone, or weights that learn where they are masked."""
    torch.manual_seed(0)
    weight, scores = torch.randn(4, 5, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)
    weight.requires_grad_()
    layout = Layout((Axis(4, True),), (Axis(5, True),), is_transposed=False)
    mask = LearnedMask(weight.detach(), layout, nn.Parameter(scores))
    mask.mask.copy_(torch.rand(4, 5) < 0.5)
    inputs, outward = torch.randn(7, 5, dtype=torch.double), torch.randn(7, 4, dtype=torch.double)
    (nn.functional.linear(inputs, mask(weight)) * outward).sum().backward()
    of_masked_weight = outward.T @ inputs
    torch.testing.assert_close(mask.scores.grad, of_masked_weight * weight.detach())
    torch.testing.assert_close(weight.grad, of_masked_weight * mask.mask)


@pytest.mark.parametrize("start", ["magnitude", "zero", "noise"])
def test_scores_start_where_they_are_told(start: Any) -> None:
    """Prevents first masks of noise where those of magnitude pruning are meant: short runs then collapse."""
    model = tiny()
    method = Pruning(CubicSchedule(0.5), score_init=start)
    method.attach(model)
    name, mask = next(iter(method.masks.items()))
    weight = model.get_submodule(name.removesuffix(".weight")).parametrizations.weight.original
    expected = {"magnitude": weight.abs() / weight.std(), "zero": torch.zeros_like(weight)}
    if start in expected:
        torch.testing.assert_close(mask.scores.detach(), expected[start].detach())
    else:
        assert mask.scores.std().item() == pytest.approx(0.01, rel=0.2)
    (group,) = method.parameter_groups()
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (1e-2, 0.0, 12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("score", ["magnitude", "movement", "soft_movement", "l0", "taylor", "random"])
def test_a_model_is_pruned_in_a_loop_and_baked(name: str, score: Any, tmp_path: Any) -> None:
    """Prevents a density beside the one asked for, and a checkpoint that computes otherwise than what was trained."""
    model = tiny(name)
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    method = Pruning(CubicSchedule(0.3, 0.1, 0.3), score)
    densities = train(model, method)
    assert densities[0] == 1.0
    assert densities == sorted(densities, reverse=True)
    assert densities[6:] == pytest.approx([0.3] * 4, abs=2e-3)
    trained = model(**BATCH).logits

    names = bake(model)
    assert len(names) == 2 * LINEAR[name]
    assert model.state_dict().keys() == plain.keys()
    assert torch.equal(model(**BATCH).logits, trained)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(**BATCH).logits, trained)
    total = 0
    for weight, density in density_by_weight(loaded, names).items():
        size = loaded.get_parameter(weight).numel()
        total += round(density * size)
        assert method.ranking == "global" or abs(density * size - 0.3 * size) <= 1
        assert not torch.signbit(loaded.get_parameter(weight)[loaded.get_parameter(weight) == 0]).any()
    every = sum(mask.mask.numel() for mask in method.masks.values())
    assert method.ranking == "tensor" or abs(total - 0.3 * every) <= 1


@pytest.mark.parametrize("score", ["movement", "soft_movement", "l0", "taylor"])
def test_a_matrix_of_zeros_is_pruned_too(score: Any) -> None:
    """Prevents scores that are not numbers, in one matrix or by one threshold in all, where all weights are zero."""
    model = tiny()
    query = model.bert.encoder.layer[1].attention.self.query
    nn.init.zeros_(query.weight)
    nn.init.ones_(query.bias)  # else keys have no gradient
    method = Pruning(CubicSchedule(0.3, 0.1, 0.3), score)
    train(model, method)
    assert all(group.ranking().isfinite().all() for group in method.groups)


def test_masks_stay_once_the_density_is_reached() -> None:
    """Prevents a cool-down in which the model is fine-tuned for masks that it will not have."""
    model = tiny()
    method = Pruning(CubicSchedule(0.3, 0.0, 0.5))
    train(model, method, steps=4)
    before = [mask.mask.clone() for mask in method.masks.values()]
    with torch.no_grad():
        for mask in method.masks.values():
            mask.scores.neg_()
    method.step(1.0)
    assert all(torch.equal(one, mask.mask) for one, mask in zip(before, method.masks.values(), strict=True))


def test_weights_are_rewound_and_masks_are_not() -> None:
    """Prevents masks of the weights gone back to, weights rewound to another step, and scores rewound with them."""
    for score in ("magnitude", "movement"):
        model, schedule = tiny(), IterativeSchedule(0.25, rounds=2, rewind_to=0.25)
        pruning, rewinding = Pruning(schedule, score), Rewinding(schedule, weights=True)
        pruning.attach(model)
        rewinding.attach(model)
        rewinding.start(10)  # the first training has 4 steps, those after it 3
        assert rewinding.learning_rate_steps(10) == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3]
        past = {}
        for step in range(11):
            pruning.step(step / 10)
            if step in (4, 7):
                for group in pruning.groups:
                    count = round(0.5 ** (1 if step == 4 else 2) * group.group.count)
                    assert torch.equal(group.kept, keep_highest(group.ranking(), count))
            past[step] = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
            rewinding.step(step / 10)
            for name, tensor in model.named_parameters():
                is_rewound = step in (4, 7) and not name.endswith("scores")
                assert torch.equal(tensor, past[1 if is_rewound else step][name]), (step, name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
        pruning.finish()


def test_rounds_need_steps() -> None:
    """Prevents rounds that fall on one step, and training that never follows the last of them."""
    schedule = IterativeSchedule(0.125, rounds=3)
    assert [schedule.at(step / 8) for step in range(9)] == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25] + 3 * [0.125])
    schedule.check(4)
    with pytest.raises(InputError, match=r"has 3 optimizer steps, too few for 3 rounds: .* before the steps 1, 2, 3, "):
        schedule.check(3)
    with pytest.raises(InputError, match="0 rounds of pruning"):
        IterativeSchedule(0.5, rounds=0)
    with pytest.raises(InputError, match=r"cannot be rewound to 1\.0"):
        IterativeSchedule(0.5, rewind_to=1.0)


def test_the_penalty_is_the_mean_sigmoid_and_ends_with_the_schedule() -> None:
    """Prevents a penalty that grows with the model, or that goes on where masks can no longer follow."""
    method = Pruning(CubicSchedule(0.3), "soft_movement", score_penalty=2.0)
    method.attach(tiny())
    every = torch.cat([mask.scores.flatten() for mask in method.masks.values()])
    torch.testing.assert_close(method.penalty(), 2 * every.double().sigmoid().mean().float())
    method.step(0.7)
    assert method.penalty() == 0.0
    assert Pruning(CubicSchedule(0.3), "movement").penalty() == 0.0


@pytest.mark.parametrize("score", ["movement", "soft_movement", "l0", "taylor"])
def test_a_module_without_a_gradient_is_named(score: Any) -> None:
    """Prevents scores that nothing teaches, or a penalty alone, from being taken for learned ones."""
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    method = Pruning(CubicSchedule(0.3), score, patterns=["*"])
    method.attach(model)
    (model(**BATCH).last_hidden_state.square().sum() + method.penalty()).backward()
    with pytest.raises(InputError, match=r"scores of pooler\.dense get no gradient"):
        method.check_gradients()


def test_scores_are_learned_beside_weights_that_are_not() -> None:
    """Prevents a model whose weights are frozen, with learned masks, from being refused for their missing gradients."""
    model = tiny()
    method = Pruning(CubicSchedule(0.3))
    method.attach(model.requires_grad_(False))
    nn.functional.cross_entropy(model(**BATCH).logits, torch.tensor([0, 2])).backward()
    method.check_gradients()


def test_a_run_that_ends_elsewhere_says_so() -> None:
    """Prevents a model of another density, or one whose masks are gone, from passing for the one asked for."""
    model = tiny()
    method = Pruning(CubicSchedule(0.3))
    method.attach(model)
    method.step(0.4)
    with pytest.raises(RuntimeError, match=r"a density of .* instead of 0\.3"):
        method.finish()
    method.step(1.0)
    method.finish()
    bake(model.bert.encoder.layer[0])
    with pytest.raises(RuntimeError, match="6 of 12 modules have lost their masks"):
        method.finish()
