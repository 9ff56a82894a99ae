"""Laws that every loss obeys, against naive float64 references written out here."""

import math

import pytest
import torch
from torch import Tensor

from prunelle.losses import HardLabelLoss, HiddenCosineLoss, SoftTargetLoss


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


def test_soft_targets_by_hand() -> None:
    """Prevents a reference and a loss that are wrong alike: (1/2, 1/2) against (3/4, 1/4) at T = 1."""
    student, teacher = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert SoftTargetLoss(1.0)(student, teacher).item() == pytest.approx(by_hand, rel=1e-6)


def test_hard_labels_equal_the_naive_reference(random: torch.Generator) -> None:
    """Prevents rows that are left out from counting in the mean."""
    student = torch.randn(6, 5, generator=random, dtype=torch.float64)
    labels = torch.tensor([0, -100, 4, 2, -100, 1])
    assert HardLabelLoss()(student, labels).item() == pytest.approx(naive_hard_label(student, labels), rel=1e-12)


def test_cosine_equals_the_naive_reference_over_attended_tokens(random: torch.Generator) -> None:
    """Prevents padding, whose states mean nothing, from being distilled."""
    student, teacher = torch.randn(2, 3, 4, 5, generator=random, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    result = HiddenCosineLoss()(student, teacher, mask)
    assert result.item() == pytest.approx(naive_cosine(student, teacher, mask), rel=1e-12)
    disturbed = torch.where(mask.bool().unsqueeze(-1), student, 1e3)
    assert torch.equal(HiddenCosineLoss()(disturbed, teacher, mask), result)


def test_nothing_is_left_to_learn_where_student_equals_teacher(random: torch.Generator) -> None:
    """Prevents a loss with an offset, and gradients that push a perfect student away."""
    logits = torch.randn(4, 9, generator=random, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(2, 3, 8, generator=random, dtype=torch.float64, requires_grad=True)
    for loss, inputs in (
        (SoftTargetLoss(3.0)(logits, logits.detach()), logits),
        (HiddenCosineLoss()(hidden, hidden.detach(), torch.ones(2, 3)), hidden),
    ):
        assert abs(loss.item()) < 1e-12
        (gradient,) = torch.autograd.grad(loss, inputs)
        assert gradient.abs().max() < 1e-12


def test_finite_where_nothing_is_asked(random: torch.Generator) -> None:
    """Prevents NaN weights after a batch in which every token is masked out."""
    logits = torch.randn(4, 9, generator=random, requires_grad=True)
    hidden = torch.randn(2, 3, 8, generator=random, requires_grad=True)
    for loss, inputs in (
        (SoftTargetLoss()(logits[:0], logits[:0].detach()), logits),
        (HardLabelLoss()(logits, torch.full((4,), -100)), logits),
        (HiddenCosineLoss()(hidden, hidden.detach(), torch.zeros(2, 3)), hidden),
    ):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, inputs)
        assert gradient.isfinite().all()
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("sizes", [(8,), (2, 2, 2, 2), (1, 5, 2)])
def test_accumulated_batches_give_the_gradient_of_one(random: torch.Generator, sizes: tuple[int, ...]) -> None:
    """Prevents means of means: uneven token counts must weigh by tokens, not by batches."""
    student, teacher = torch.randn(2, 8, 6, 5, generator=random, dtype=torch.float64)
    mask = (torch.rand(8, 6, generator=random) < 0.6).long()
    labels = torch.where(mask.bool(), torch.randint(5, (8, 6), generator=random), -100)
    total = mask.sum()

    def gradients(batches: list[slice]) -> list[Tensor]:
        weights = [student.clone().requires_grad_() for _ in range(3)]
        for rows in batches:
            chosen = mask[rows].bool()
            SoftTargetLoss()(weights[0][rows][chosen], teacher[rows][chosen], total).backward()
            HardLabelLoss()(weights[1][rows].flatten(0, 1), labels[rows].flatten(), total).backward()
            HiddenCosineLoss()(weights[2][rows], teacher[rows], mask[rows], total).backward()
        return [weight.grad for weight in weights if weight.grad is not None]

    ends = torch.tensor(sizes).cumsum(0).tolist()
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    for whole, accumulated in zip(gradients([slice(0, 8)]), gradients(parts), strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-12, atol=1e-15)


def test_half_precision_is_computed_in_float32(random: torch.Generator) -> None:
    """Prevents a softmax over a vocabulary summed in bfloat16."""
    student, teacher = torch.randn(2, 4, 3000, generator=random).bfloat16()
    result = SoftTargetLoss()(student, teacher)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(naive_soft_target(student, teacher, 2.0), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_means_nothing_is_rejected(temperature: float) -> None:
    """Prevents a division by zero, or a sign change, that only shows as a loss that does not fall."""
    with pytest.raises(ValueError, match="temperature"):
        SoftTargetLoss(temperature)


def test_shapes_that_would_broadcast_are_rejected() -> None:
    """Prevents one teacher row from being compared with every student row."""
    with pytest.raises(ValueError, match="rows, classes"):
        SoftTargetLoss()(torch.zeros(4, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="one class a row"):
        HardLabelLoss()(torch.zeros(4, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="batch, tokens"):
        HiddenCosineLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.ones(2, 1))
