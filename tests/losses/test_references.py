"""Every loss beyond DistilBERT's against a naive float64 reference: loops over Python numbers, as the formula reads."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prunelle.losses import (
    AttentionMapLoss,
    DecoupledLoss,
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

MASK = [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]]


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def logits(random: torch.Generator) -> tuple[Tensor, Tensor]:
    student, teacher = 2 * torch.randn(2, 7, 6, generator=random, dtype=torch.float64)
    return student, teacher


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [x / sum(powers) for x in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def distributions(logits: tuple[Tensor, Tensor], temperature: float) -> Iterator[tuple[list[float], list[float]]]:
    for s, t in zip(*(x.tolist() for x in logits), strict=True):
        yield softmax(s, temperature), softmax(t, temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_reverse_kl(logits: tuple[Tensor, Tensor], temperature: float) -> None:
    """Prevents the forward divergence under the reverse one's name."""
    expected = sum(divergence(q, p) for q, p in distributions(logits, temperature)) * temperature**2 / 7
    assert ReverseKLLoss(temperature)(*logits).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon(logits: tuple[Tensor, Tensor], beta: float) -> None:
    """Prevents beta from weighing the student where it should weigh the teacher."""
    expected = 0.0
    for q, p in distributions(logits, 2.0):
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        expected += beta * divergence(p, m) + (1 - beta) * divergence(q, m)
    assert JensenShannonLoss(beta, 2.0)(*logits).item() == pytest.approx(expected * 4 / 7, rel=1e-12)


def test_jensen_shannon_between_forward_and_reverse(logits: tuple[Tensor, Tensor]) -> None:
    """Prevents a beta that counts from the wrong end: the docstring's limits."""
    near_0, near_1 = JensenShannonLoss(1e-6)(*logits) / 1e-6, JensenShannonLoss(1 - 1e-6)(*logits) / 1e-6
    assert near_0.item() == pytest.approx(SoftTargetLoss()(*logits).item(), rel=1e-4)
    assert near_1.item() == pytest.approx(ReverseKLLoss()(*logits).item(), rel=1e-4)


def test_logit_mse(logits: tuple[Tensor, Tensor]) -> None:
    """Prevents a division by rows or classes that is missing or twice."""
    rows = zip(*(x.tolist() for x in logits), strict=True)
    expected = sum((a - b) ** 2 for s, t in rows for a, b in zip(s, t, strict=True)) / 6 / 7
    assert LogitMSELoss()(*logits).item() == pytest.approx(expected, rel=1e-12)


def test_decoupled(logits: tuple[Tensor, Tensor]) -> None:
    """Prevents the two parts from being mixed up, and rows without a label from counting."""
    labels = [0, 5, -100, 2, 3, -100, 1]
    expected = 0.0
    for (q, p), y in zip(distributions(logits, 3.0), labels, strict=True):
        if y != -100:
            others = [c for c in range(6) if c != y]
            p_others, q_others = ([x[c] / (1 - x[y]) for c in others] for x in (p, q))
            expected += 0.7 * divergence([p[y], 1 - p[y]], [q[y], 1 - q[y]]) + 5.0 * divergence(p_others, q_others)
    result = DecoupledLoss(0.7, 5.0, 3.0)(*logits, torch.tensor(labels))
    assert result.item() == pytest.approx(expected * 9 / 5, rel=1e-12)


def test_decoupled_is_the_divergence_taken_apart(logits: tuple[Tensor, Tensor]) -> None:
    """Prevents parts that do not add up: with beta the teacher's doubt it is the forward divergence."""
    labels = torch.tensor([0, 5, 4, 2, 3, 3, 1])
    for s, t, y in zip(*logits, labels, strict=True):
        doubt = 1 - (t / 2).softmax(-1)[y].item()
        result = DecoupledLoss(1.0, doubt, 2.0)(s[None], t[None], y[None])
        assert result.item() == pytest.approx(SoftTargetLoss(2.0)(s[None], t[None]).item(), rel=1e-12)


def test_decoupled_of_a_sure_teacher_is_finite() -> None:
    """Prevents infinities where float32 rounds the probability of all other classes to 0."""
    student = torch.tensor([[200.0, 0.0, 1.0]], requires_grad=True)
    loss = DecoupledLoss()(student, torch.tensor([[300.0, 3.0, 0.0]]), torch.tensor([0]))
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k(logits: tuple[Tensor, Tensor], k: int) -> None:
    """Prevents a tail that is left out, or renormalized away."""
    expected = 0.0
    for q, p in distributions(logits, 2.0):
        top = sorted(range(6), key=lambda c: -p[c])[:k]
        expected += divergence(*([x[c] for c in top] + [1 - sum(x[c] for c in top)] for x in (p, q)))
    result = TopKTargetLoss(2.0)(logits[0], *top_k_distribution(logits[1], k, 2.0))
    assert result.item() == pytest.approx(expected * 4 / 7, rel=1e-11)
    assert result <= SoftTargetLoss(2.0)(*logits) + 1e-12
    # Its gradient is written by hand, which nothing else would notice.
    targets = top_k_distribution(logits[1], k, 2.0)
    assert torch.autograd.gradcheck(lambda student: TopKTargetLoss(2.0)(student, *targets), logits[0].requires_grad_())


def test_a_tail_smaller_than_rounding_is_kept() -> None:
    """Prevents the tail's probability from being one minus the top's: 0 in float32 where it is 1e-9."""
    log_probabilities, indices = top_k_distribution(torch.tensor([[0.0, -21.0, -22.0]]), 1, 1.0)
    assert indices.item() == 0
    assert log_probabilities[0, 1].item() == pytest.approx(math.log(math.exp(-21) + math.exp(-22)), rel=1e-6)


@pytest.fixture
def hidden(random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of 4 and of 6 numbers a token."""
    draw = {"generator": random, "dtype": torch.float64}
    return torch.randn(3, 5, 4, **draw), torch.randn(3, 5, 6, **draw)


def projected_tokens(
    hidden: tuple[Tensor, Tensor], projection: HiddenProjection
) -> Iterator[tuple[int, list[float], list[float]]]:
    """Example, projected student and teacher state of each attended token."""
    weight = projection.weight.tolist()
    for example, mask in enumerate(MASK):
        for token, attended in enumerate(mask):
            if attended:
                s, t = (x[example, token].tolist() for x in hidden)
                yield example, [dot(row, s) for row in weight], t


@pytest.mark.parametrize("initialization", ["identity", "random"])
def test_projected_hidden_states(hidden: tuple[Tensor, Tensor], initialization: str) -> None:
    """Prevents a projection that is transposed, forgotten, or applied to the teacher."""
    torch.manual_seed(0)
    projection = HiddenProjection(4, 6, initialization).double()
    pairs = [(s, t) for _, s, t in projected_tokens(hidden, projection)]
    mse = sum(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 6 for s, t in pairs) / len(pairs)
    cosine = sum(1 - dot(s, t) / math.hypot(*s) / math.hypot(*t) for s, t in pairs) / len(pairs)
    mask = torch.tensor(MASK)
    assert HiddenMSELoss(projection)(*hidden, mask).item() == pytest.approx(mse, rel=1e-12)
    assert HiddenCosineLoss(projection)(*hidden, mask).item() == pytest.approx(cosine, rel=1e-12)


def test_an_identity_projection_changes_nothing_yet(hidden: tuple[Tensor, Tensor]) -> None:
    """Prevents a start from which a student that was cut out of its teacher has to find its way back."""
    projected = HiddenProjection(4, 6).double()(hidden[0])
    assert torch.equal(projected[..., :4], hidden[0])
    assert not projected[..., 4:].any()


def test_patient(hidden: tuple[Tensor, Tensor]) -> None:
    """Prevents a first token that is padding, and states that are not normalized."""
    projection = HiddenProjection(4, 6).double()
    first = {example: (s, t) for example, s, t in reversed(list(projected_tokens(hidden, projection)))}
    expected = 0.0
    for s, t in first.values():
        expected += sum((a / math.hypot(*s) - b / math.hypot(*t)) ** 2 for a, b in zip(s, t, strict=True))
    result = PatientLoss(projection)(*hidden, torch.tensor(MASK))
    assert result.item() == pytest.approx(expected / 3, rel=1e-12)


@pytest.fixture
def vectors(random: torch.Generator) -> list[Tensor]:
    """Student's queries and keys of 6 numbers a token, teacher's of 12."""
    return [torch.randn(3, 5, size, generator=random, dtype=torch.float64) for size in (6, 6, 12, 12)]


def scores(
    queries: Tensor, keys: Tensor, example: int, heads: int, causal: bool
) -> Iterator[tuple[int, int, list[float]]]:
    """Head, query and the scores of the keys that it sees, for each attended query of an example."""
    size = queries.shape[-1] // heads
    for head, i in itertools.product(range(heads), range(5)):
        if MASK[example][i]:
            part = slice(head * size, (head + 1) * size)
            seen = [j for j in range(5) if MASK[example][j] and (j <= i or not causal)]
            query = queries[example, i, part].tolist()
            yield head, i, [dot(query, keys[example, j, part].tolist()) / math.sqrt(size) for j in seen]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_maps(vectors: list[Tensor], causal: bool) -> None:
    """Prevents heads that are split across, scores of padding or of the future, and scales that differ."""
    total, count = 0.0, 0
    for example in range(3):
        ours, theirs = (scores(*pair, example, 3, causal) for pair in (vectors[:2], vectors[2:]))
        for (_, _, s), (_, _, t) in zip(ours, theirs, strict=True):
            total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
            count += len(s)
    result = AttentionMapLoss(3, causal)(*vectors, torch.tensor(MASK))
    assert result.item() == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_self_attention_relations(vectors: list[Tensor], heads: int, causal: bool) -> None:
    """Prevents relations in the wrong direction, over padding, or with the teacher's scale for the student."""
    total, count = 0.0, 0
    for example in range(3):
        ours, theirs = (scores(*pair, example, heads, causal) for pair in (vectors[:2], vectors[2:]))
        for (_, _, s), (_, _, t) in zip(ours, theirs, strict=True):
            total += divergence(softmax(t), softmax(s))
            count += 1
    result = SelfAttentionRelationLoss(heads, causal)(*vectors, torch.tensor(MASK))
    assert result.item() == pytest.approx(total / count, rel=1e-12)


def huber(a: float, b: float) -> float:
    return (a - b) ** 2 / 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def test_relational_distance(random: torch.Generator) -> None:
    """Prevents distances that are not in units of their mean, and pairs that count twice."""
    student = 5 * torch.randn(6, 4, generator=random, dtype=torch.float64)
    teacher = torch.randn(6, 7, generator=random, dtype=torch.float64).exp()
    relative = []
    for rows in (student.tolist(), teacher.tolist()):
        distances = [math.dist(a, b) for a, b in itertools.combinations(rows, 2)]
        relative.append([distance * len(distances) / sum(distances) for distance in distances])
    expected = sum(map(huber, *relative)) / 15
    assert RelationalDistanceLoss()(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_relational_angle(random: torch.Generator) -> None:
    """Prevents a corner at the wrong one of three rows."""
    student = torch.randn(5, 4, generator=random, dtype=torch.float64)
    teacher = torch.randn(5, 7, generator=random, dtype=torch.float64)

    def cosine(rows: list[list[float]], i: int, j: int, k: int) -> float:
        one, other = ([a - b for a, b in zip(rows[end], rows[j], strict=True)] for end in (i, k))
        return dot(one, other) / math.hypot(*one) / math.hypot(*other)

    triplets = list(itertools.permutations(range(5), 3))
    expected = sum(huber(cosine(student.tolist(), *t), cosine(teacher.tolist(), *t)) for t in triplets)
    result = RelationalAngleLoss()(student, teacher)
    assert result.item() == pytest.approx(expected / len(triplets), rel=1e-12)


@pytest.mark.parametrize("loss", [RelationalDistanceLoss(), RelationalAngleLoss()])
def test_rows_that_are_alike_have_a_finite_gradient(
    loss: RelationalDistanceLoss | RelationalAngleLoss, random: torch.Generator
) -> None:
    """Prevents NaN weights where two examples of a batch are the same sentence, or all of a fresh student's are."""
    teacher = torch.randn(4, 3, generator=random)
    for student in (torch.ones(4, 3), torch.cat([teacher[:2], teacher[:2]])):
        student = student.clone().requires_grad_()
        loss(student, teacher).backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert student.grad.abs().max() < 1e4
