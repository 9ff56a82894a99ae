"""Laws that every loss obeys, and naive float64 references of DistilBERT's three."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from prunelle.losses import (
    AttentionMapLoss,
    DecoupledLoss,
    HardLabelLoss,
    HiddenCosineLoss,
    HiddenMSELoss,
    HiddenProjection,
    JensenShannonLoss,
    LogitMSELoss,
    PatientLoss,
    RelationalAngleLoss,
    RelationalDistanceLoss,
    ReverseKLLoss,
    SelfAttentionRelationLoss,
    SoftTargetLoss,
    TopKTargetLoss,
    top_k_distribution,
)


def naive_soft_target(student: Tensor, teacher: Tensor, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p = [math.exp(x / temperature) for x in t]
        q = [math.exp(x / temperature) for x in s]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return total * temperature**2 / len(student)


def naive_hard_label(student: Tensor, labels: Tensor) -> float:
    kept = [(row, y) for row, y in zip(student.double().tolist(), labels.tolist(), strict=True) if y != -100]
    return sum(math.log(sum(map(math.exp, row))) - row[y] for row, y in kept) / len(kept)


def naive_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> float:
    distances = []
    for s, t, attended in zip(
        student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), mask.flatten().tolist(), strict=True
    ):
        if attended:
            dot = sum(a * b for a, b in zip(s, t, strict=True))
            distances.append(1 - dot / math.hypot(*s) / math.hypot(*t))
    return sum(distances) / len(distances)


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_soft_targets_equal_the_naive_reference(random: torch.Generator, temperature: float) -> None:
    """Prevents a divergence without the teacher's entropy, without T squared, or averaged over classes."""
    student, teacher = torch.randn(2, 7, 11, generator=random, dtype=torch.float64)
    result = SoftTargetLoss(temperature)(student, teacher)
    assert result.item() == pytest.approx(naive_soft_target(student, teacher, temperature), rel=1e-12)


LN2, LN3 = math.log(2), math.log(3)
SURE, TORN = torch.tensor([[LN3, 0.0]]), torch.tensor([[0.0, 0.0]])  # (3/4, 1/4) and (1/2, 1/2) at T = 1
FIRST, SECOND = torch.tensor([[LN2, 0.0, 0.0]]), torch.tensor([[0.0, LN3, 0.0]])  # (2, 1, 1) / 4 and (1, 3, 1) / 5
ONE, OTHER = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]])
CORNER, EQUAL = torch.tensor([[0.0, 0.0], [1, 0], [0, 1]]), torch.tensor([[0.0, 0.0], [1, 0], [0.5, math.sqrt(0.75)]])


def ln(numerator: float, denominator: float) -> float:
    return math.log(numerator / denominator)


def vectors(*numbers: float) -> Tensor:
    """(1, tokens, 1): one number a token."""
    return torch.tensor(numbers).view(1, -1, 1)


BY_HAND: dict[str, tuple[Tensor, float]] = {
    "soft targets": (SoftTargetLoss(1.0)(SURE, TORN), (ln(2, 3) + ln(2, 1)) / 2),
    "reverse KL": (ReverseKLLoss(1.0)(SURE, TORN), (3 * ln(3, 2) + ln(1, 2)) / 4),
    "Jensen-Shannon": (
        JensenShannonLoss(0.5, 1.0)(SURE, TORN),  # the mixture is (5/8, 3/8)
        ((ln(4, 5) + ln(4, 3)) / 2 + (3 * ln(6, 5) + ln(2, 3)) / 4) / 2,
    ),
    "logit MSE": (LogitMSELoss()(SURE, TORN), LN3**2 / 2),
    "decoupled": (
        DecoupledLoss(1.0, 8.0, 1.0)(FIRST, SECOND, torch.tensor([0])),
        (ln(2, 5) + 4 * ln(8, 5)) / 5 + 8 * (3 * ln(3, 2) + ln(1, 2)) / 4,
    ),
    "top k": (TopKTargetLoss(1.0)(FIRST, *top_k_distribution(SECOND, 1, 1.0)), (3 * ln(12, 5) + 2 * ln(8, 15)) / 5),
    "hard labels": (HardLabelLoss()(SURE, torch.tensor([1])), ln(4, 1)),
    "hidden cosine": (HiddenCosineLoss()(ONE, OTHER, torch.ones(1, 1)), 1 / 25),
    "hidden MSE": (HiddenMSELoss()(ONE, OTHER, torch.ones(1, 1)), 1.0),
    "patient": (PatientLoss()(ONE, OTHER, torch.ones(1, 1)), 2 / 25),
    "attention map": (  # 24 and 7 over the square root of 2
        AttentionMapLoss(1)(ONE, OTHER, ONE, torch.tensor([[[1.0, 1.0]]]), torch.ones(1, 1)),
        17**2 / 2,
    ),
    "relation": (  # (3/4, 1/4) and (1/2, 1/2) against twice (1/2, 1/2)
        SelfAttentionRelationLoss(1)(*[vectors(math.sqrt(LN3), 0)] * 2, *[vectors(0, 0)] * 2, torch.ones(1, 2)),
        (ln(2, 3) + ln(2, 1)) / 4,
    ),
    "relational distance": (  # 1, 3, 2 in units of 2 against 1, 2, 1 in units of 4/3
        RelationalDistanceLoss()(vectors(0, 1, 3)[0], vectors(0, 1, 2)[0]),
        2 * 0.25**2 / 2 / 3,
    ),
    "relational angle": (  # 90, 45 and 45 degrees against 60
        RelationalAngleLoss()(CORNER, EQUAL),
        (0.5**2 / 2 + 2 * (math.sqrt(0.5) - 0.5) ** 2 / 2) / 3,
    ),
}


@pytest.mark.parametrize(("found", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_values_by_hand(found: Tensor, expected: float) -> None:
    """Prevents a reference and a loss that are wrong alike."""
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_hard_labels_equal_the_naive_reference(random: torch.Generator) -> None:
    """Prevents rows that are left out from counting in the mean."""
    student = torch.randn(6, 5, generator=random, dtype=torch.float64)
    labels = torch.tensor([0, -100, 4, 2, -100, 1])
    assert HardLabelLoss()(student, labels).item() == pytest.approx(naive_hard_label(student, labels), rel=1e-12)


def test_smoothed_labels_equal_the_naive_reference(random: torch.Generator) -> None:
    """Prevents smoothing that does nothing, or that rows which are left out take part in."""
    student = torch.randn(6, 5, generator=random, dtype=torch.float64)
    labels = torch.tensor([0, -100, 4, 2, -100, 1])
    chances = student.softmax(-1)
    expected = sum(
        -math.log(chances[row, c].item()) * (0.7 * (c == int(labels[row])) + 0.3 / 5)
        for row in (0, 2, 3, 5)
        for c in range(5)
    )
    assert HardLabelLoss(0.3)(student, labels, 8).item() == pytest.approx(expected / 8, rel=1e-12)


def test_cosine_equals_the_naive_reference_over_attended_tokens(random: torch.Generator) -> None:
    """Prevents padding, whose states mean nothing, from being distilled."""
    student, teacher = torch.randn(2, 3, 4, 5, generator=random, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    result = HiddenCosineLoss()(student, teacher, mask)
    assert result.item() == pytest.approx(naive_cosine(student, teacher, mask), rel=1e-12)
    disturbed = torch.where(mask.bool().unsqueeze(-1), student, 1e3)
    assert torch.equal(HiddenCosineLoss()(disturbed, teacher, mask), result)


@dataclass(frozen=True)
class Case:
    """How a loss is fed from one batch of states, a mask and labels, and what it counts in it."""

    loss: nn.Module
    feed: Callable[[nn.Module, Batch], Tensor]
    items: Callable[[Batch], Tensor]
    compares: bool = True  # with a teacher
    accumulates: bool = True  # otherwise it relates the examples of one call, and has no mask


@dataclass(frozen=True)
class Batch:
    student: Tensor
    teacher: Tensor
    mask: Tensor
    labels: Tensor
    total: Tensor | None = None

    def rows(self, which: slice) -> Batch:
        tensors = (self.student, self.teacher, self.mask, self.labels)
        return Batch(*(tensor[which] for tensor in tensors), total=self.total)


def on_logits(loss: nn.Module, batch: Batch) -> Tensor:
    chosen = batch.mask.bool()
    return loss(batch.student[chosen], batch.teacher[chosen], batch.total)


def on_labels(loss: nn.Module, batch: Batch) -> Tensor:
    return loss(batch.student.flatten(0, 1), batch.labels.flatten(), batch.total)


def on_logits_and_labels(loss: nn.Module, batch: Batch) -> Tensor:
    logits = (batch.student.flatten(0, 1), batch.teacher.flatten(0, 1))
    return loss(*logits, batch.labels.flatten(), batch.total)


def on_top_k(loss: nn.Module, batch: Batch) -> Tensor:
    chosen = batch.mask.bool()
    return loss(batch.student[chosen], *top_k_distribution(batch.teacher[chosen], 4, loss.temperature), batch.total)


def on_hidden(loss: nn.Module, batch: Batch) -> Tensor:
    return loss(batch.student, batch.teacher, batch.mask, batch.total)


def on_vectors(loss: nn.Module, batch: Batch) -> Tensor:
    queries_and_keys = (batch.student, batch.student.flip(-1), batch.teacher, batch.teacher.flip(-1))
    return loss(*queries_and_keys, batch.mask, batch.total)


def on_examples(loss: nn.Module, batch: Batch) -> Tensor:
    # An example of which nothing is attended is none.
    there = batch.mask.bool().any(-1)
    return loss(batch.student[there, 0], batch.teacher[there, 0], batch.total)


def tokens(batch: Batch) -> Tensor:
    return batch.mask.sum()


def pairs(batch: Batch) -> Tensor:
    return batch.mask.sum(-1).square().sum()


def causal_pairs(batch: Batch) -> Tensor:
    return (batch.mask.sum(-1) * (batch.mask.sum(-1) + 1) // 2).sum()


def examples(batch: Batch) -> Tensor:
    return batch.mask.any(-1).sum()


CASES = {
    "soft targets": Case(SoftTargetLoss(3.0), on_logits, tokens),
    "reverse KL": Case(ReverseKLLoss(3.0), on_logits, tokens),
    "Jensen-Shannon": Case(JensenShannonLoss(0.3, 3.0), on_logits, tokens),
    "logit MSE": Case(LogitMSELoss(), on_logits, tokens),
    "decoupled": Case(DecoupledLoss(0.7, 3.0, 3.0), on_logits_and_labels, tokens),
    "top k": Case(TopKTargetLoss(3.0), on_top_k, tokens),
    "hard labels": Case(HardLabelLoss(), on_labels, tokens, compares=False),
    "hidden cosine": Case(HiddenCosineLoss(), on_hidden, tokens),
    "hidden cosine, projected": Case(HiddenCosineLoss(HiddenProjection(12, 12)), on_hidden, tokens),
    "hidden MSE": Case(HiddenMSELoss(), on_hidden, tokens),
    "hidden MSE, projected": Case(HiddenMSELoss(HiddenProjection(12, 12)), on_hidden, tokens),
    "patient": Case(PatientLoss(), on_hidden, examples),
    "attention map": Case(AttentionMapLoss(3), on_vectors, pairs),
    "attention map, causal": Case(AttentionMapLoss(3, causal=True), on_vectors, causal_pairs),
    "relation": Case(SelfAttentionRelationLoss(4), on_vectors, tokens),
    "relation, causal": Case(SelfAttentionRelationLoss(4, causal=True), on_vectors, tokens),
    "relational distance": Case(RelationalDistanceLoss(), on_examples, examples, accumulates=False),
    "relational angle": Case(RelationalAngleLoss(), on_examples, examples, accumulates=False),
}


def every_loss(which: Callable[[Case], bool] = lambda case: True) -> pytest.MarkDecorator:
    chosen = {name: case for name, case in CASES.items() if which(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


@pytest.fixture
def batch(random: torch.Generator) -> Batch:
    student, teacher = torch.randn(2, 8, 6, 12, generator=random, dtype=torch.float64)
    mask = (torch.rand(8, 6, generator=random) < 0.6).long()
    labels = torch.where(mask.bool(), torch.randint(12, (8, 6), generator=random), -100)
    return Batch(student, teacher, mask, labels)


@pytest.fixture(autouse=True)
def _float64() -> None:
    for case in CASES.values():
        case.loss.double()


@every_loss(lambda case: case.compares)
def test_nothing_is_left_to_learn_where_student_equals_teacher(case: Case, batch: Batch) -> None:
    """Prevents a loss with an offset, and gradients that push a perfect student away."""
    student = batch.teacher.clone().requires_grad_()
    loss = case.feed(case.loss, replace(batch, student=student))
    assert abs(loss.item()) < 1e-12
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.abs().max() < 1e-12


@every_loss()
def test_there_is_something_to_learn_elsewhere(case: Case, batch: Batch) -> None:
    """Prevents a loss that is 0 for everybody, or that no gradient of the student's can lower."""
    student = batch.student.clone().requires_grad_()
    loss = case.feed(case.loss, replace(batch, student=student))
    assert loss.item() > 1e-3
    (gradient,) = torch.autograd.grad(loss, student)
    with torch.no_grad():
        assert case.feed(case.loss, replace(batch, student=student - 1e-3 * gradient)) < loss


@every_loss()
def test_finite_where_nothing_is_asked(case: Case, batch: Batch) -> None:
    """Prevents NaN weights after a batch in which every token is masked out."""
    student = batch.student.clone().requires_grad_()
    nothing = replace(
        batch, student=student, mask=torch.zeros_like(batch.mask), labels=torch.full_like(batch.labels, -100)
    )
    loss = case.feed(case.loss, nothing)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    assert gradient.abs().max() == 0


@every_loss(lambda case: case.accumulates)
def test_what_is_masked_takes_no_part(case: Case, batch: Batch) -> None:
    """Prevents padding, whose states mean nothing, from being distilled."""
    masked = ~batch.mask.bool().unsqueeze(-1)
    disturbed = replace(
        batch, student=batch.student.masked_fill(masked, 7.0), teacher=batch.teacher.masked_fill(masked, -3.0)
    )
    torch.testing.assert_close(case.feed(case.loss, disturbed), case.feed(case.loss, batch), rtol=1e-14, atol=0)


@every_loss(lambda case: case.accumulates)
@pytest.mark.parametrize("sizes", [(8,), (2, 2, 2, 2), (1, 5, 2)])
def test_accumulated_batches_give_the_gradient_of_one(case: Case, batch: Batch, sizes: tuple[int, ...]) -> None:
    """Prevents means of means: uneven token counts must weigh by tokens, not by batches."""

    def gradients(parts: list[slice], total: Tensor | None) -> list[Tensor]:
        case.loss.zero_grad()
        student = batch.student.clone().requires_grad_()
        for part in parts:
            case.feed(case.loss, replace(batch, student=student, total=total).rows(part)).backward()
        gradients = [student.grad, *(parameter.grad for parameter in case.loss.parameters())]
        return [gradient.clone() for gradient in gradients if gradient is not None]

    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    # By itself a loss counts what the trainer counts over the whole batch.
    whole = gradients([slice(0, 8)], total=None)
    for one, accumulated in zip(whole, gradients(parts, case.items(batch)), strict=True):
        torch.testing.assert_close(accumulated, one, rtol=1e-12, atol=1e-15)


@every_loss()
def test_half_precision_is_computed_in_float32(case: Case, batch: Batch) -> None:
    """Prevents sums in bfloat16: over a vocabulary, over tokens, or in the products of queries and keys."""
    coarse = replace(batch, student=batch.student.bfloat16(), teacher=batch.teacher.bfloat16())
    exact = replace(batch, student=coarse.student.double(), teacher=coarse.teacher.double())
    expected = case.feed(case.loss, exact)
    case.loss.float()
    with torch.autocast("cpu", torch.bfloat16):
        result = case.feed(case.loss, coarse)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_vocabulary_in_half_precision(random: torch.Generator) -> None:
    """Prevents a softmax over a vocabulary summed in bfloat16."""
    student, teacher = torch.randn(2, 4, 3000, generator=random).bfloat16()
    result = SoftTargetLoss()(student, teacher)
    assert result.item() == pytest.approx(naive_soft_target(student, teacher, 2.0), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("loss", [SoftTargetLoss, ReverseKLLoss, JensenShannonLoss, DecoupledLoss, TopKTargetLoss])
def test_a_temperature_that_means_nothing_is_rejected(loss: type[nn.Module], temperature: float) -> None:
    """Prevents a division by zero, or a sign change, that only shows as a loss that does not fall."""
    with pytest.raises(ValueError, match="temperature"):
        loss(temperature=temperature)


REJECTED = {
    "beta 0": (lambda: JensenShannonLoss(0.0), "beta"),
    "beta 1": (lambda: JensenShannonLoss(1.0), "beta"),
    "weights of 0": (lambda: DecoupledLoss(0.0, 0.0), "one above"),
    "a negative weight": (lambda: DecoupledLoss(-1.0, 1.0), "at least 0"),
    "no heads to compare": (lambda: AttentionMapLoss(0), "heads"),
    "no heads to relate": (lambda: SelfAttentionRelationLoss(0), "heads"),
    "no size": (lambda: HiddenProjection(0, 4), "sizes"),
    "an unknown start": (lambda: HiddenProjection(4, 4, "zeros"), "identity or random"),
    "all classes in the top": (lambda: top_k_distribution(torch.zeros(2, 3), 3), "k = 3"),
}


@pytest.mark.parametrize(("make", "message"), REJECTED.values(), ids=REJECTED)
def test_values_that_mean_nothing_are_rejected(make: Callable[[], object], message: str) -> None:
    """Prevents losses that are 0 whatever the student does."""
    with pytest.raises(ValueError, match=message):
        make()


SHAPES: dict[str, tuple[nn.Module, tuple[Tensor, ...], str]] = {
    **{
        type(loss).__name__: (loss, (torch.zeros(4, 3), torch.zeros(1, 3)), "rows, classes")
        for loss in (SoftTargetLoss(), ReverseKLLoss(), JensenShannonLoss(), LogitMSELoss())
    },
    **{
        type(loss).__name__: (loss, (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 1)), "batch, tokens")
        for loss in (HiddenCosineLoss(), HiddenMSELoss(), PatientLoss())
    },
    **{
        type(loss).__name__: (loss, (torch.zeros(2, 3, 4),) * 3 + (torch.zeros(1, 3, 4), torch.ones(2, 3)), "batch, to")
        for loss in (AttentionMapLoss(2), SelfAttentionRelationLoss(2))
    },
    **{
        type(loss).__name__: (loss, (torch.zeros(4, 3), torch.zeros(1, 3)), "as many rows")
        for loss in (RelationalDistanceLoss(), RelationalAngleLoss())
    },
    "hard labels": (HardLabelLoss(), (torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)), "one class a row"),
    "decoupled": (DecoupledLoss(), (*torch.zeros(2, 4, 3), torch.zeros(1, dtype=torch.long)), "one class a row"),
    "decoupled, 1 class": (DecoupledLoss(), (*torch.zeros(2, 4, 1), torch.zeros(4, dtype=torch.long)), "2 classes"),
    "top k": (TopKTargetLoss(), (torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.long)), "k [+] 1"),
    "heads": (SelfAttentionRelationLoss(3), (*torch.zeros(4, 2, 3, 4), torch.ones(2, 3)), "3 heads do not divide"),
    "projected": (
        HiddenMSELoss(HiddenProjection(4, 6)),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.ones(2, 3)),
        r"projected to \(2, 3, 6\)",
    ),
}


@pytest.mark.parametrize(("loss", "inputs", "message"), SHAPES.values(), ids=SHAPES)
def test_shapes_that_would_broadcast_are_rejected(loss: nn.Module, inputs: tuple[Tensor, ...], message: str) -> None:
    """Prevents one teacher row from being compared with every student row."""
    with pytest.raises(ValueError, match=message):
        loss(*inputs)
