"""Which terms can be had of which pair of models: the layers compared, and what is refused before training."""

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedModel,
)

from prunelle.errors import InputError
from prunelle.trainers import DistillationArguments
from prunelle.trainers.ensemble import Ensemble
from prunelle.trainers.layer_map import layer_pairs
from prunelle.trainers.objective import build_objective

SIZES = {"vocab_size": 40, "num_labels": 3, "intermediate_size": 24, "max_position_embeddings": 12}


def bert(layers: int, hidden: int, heads: int) -> PreTrainedModel:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return BertForSequenceClassification(BertConfig(**SIZES, **sizes))


def mpnet() -> PreTrainedModel:
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    return MPNetForSequenceClassification(MPNetConfig(**SIZES, **sizes))


def gpt2() -> PreTrainedModel:
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=40, num_labels=3, n_embd=16, n_layer=2, n_head=2))


@pytest.mark.parametrize(
    ("text", "teacher", "student", "expected"),
    [
        ("last", 6, 3, [(5, 2)]),
        ("uniform", 12, 4, [(2, 0), (5, 1), (8, 2), (11, 3)]),
        ("uniform", 6, 6, [(layer, layer) for layer in range(6)]),
        ("uniform", 5, 2, [(1, 0), (4, 1)]),
        ("uniform", 2, 5, [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4)]),
        ("1:0,3:1,5:2", 6, 3, [(1, 0), (3, 1), (5, 2)]),
    ],
)
def test_layer_maps(text: str, teacher: int, student: int, expected: list[tuple[int, int]]) -> None:
    """Prevents student and teacher from changing places, and a last layer that is compared with an earlier one."""
    assert layer_pairs(text, "--layer_map", teacher, student) == expected


def test_the_flags_reach_the_terms(tmp_path: Path) -> None:
    """Prevents a map for hidden states from being one for relations, or from missing the embeddings' place."""
    arguments = DistillationArguments(
        output_dir=str(tmp_path),
        hidden_mse_weight=1.0,
        embedding_weight=1.0,
        attention_weight=1.0,
        relation_weight=1.0,
        layer_map="0:0,3:1",
        relation_layer_map="2:1",
    )
    objective = build_objective(bert(2, 16, 2), bert(4, 16, 2), arguments)
    terms: Any = objective.terms
    assert terms["hidden_mse"].pairs == [(1, 1), (4, 2)]
    assert terms["embedding"].pairs == [(0, 0)]
    assert terms["attention"].vector_pairs == [(0, 0), (3, 1)]
    assert terms["relation"].vector_pairs == [(2, 1)]
    assert sorted(objective.student_attention) == [0, 1]
    assert sorted(objective.teacher_attention) == [0, 2, 3]


def test_nothing_is_asked_that_no_term_needs(tmp_path: Path) -> None:
    """Prevents hidden states of all layers from being kept for a loss on logits."""
    weights = {"hidden_cosine_weight": 0.0, "relation_weight": 1.0}
    objective = build_objective(bert(1, 16, 2), bert(2, 16, 2), DistillationArguments(str(tmp_path), **weights))
    assert not objective.needs_hidden_states
    assert not list(objective.parameters())
    alone = {"hidden_cosine_weight": 0.0, "soft_target_weight": 0.0}
    objective = build_objective(bert(1, 16, 2), bert(2, 16, 2), DistillationArguments(str(tmp_path), **alone))
    assert not objective.needs_teacher
    assert not objective.student_attention


def test_a_temperature_that_moves_takes_an_ensemble_along(tmp_path: Path) -> None:
    """Prevents probabilities that are averaged at one temperature and softened at another."""
    teachers = Ensemble([bert(2, 16, 2), bert(2, 16, 2)], temperature=2.0)
    objective = build_objective(
        bert(1, 16, 2), teachers, DistillationArguments(str(tmp_path), schedules=["temperature:4:cosine"])
    )
    objective.move(0.5)
    terms: Any = objective.terms
    assert teachers.temperature == terms["soft_target"].loss.temperature == pytest.approx(3.0)


NARROW = (bert(2, 12, 2), bert(4, 16, 2))
ALIKE = (bert(2, 16, 2), bert(4, 16, 2))
NUMBERS = (bert(1, 16, 2), bert(2, 16, 2))
for model in NUMBERS:
    model.config.problem_type = "regression"
REFUSED: dict[str, tuple[tuple[PreTrainedModel, PreTrainedModel], dict[str, Any], str]] = {
    "hidden sizes that differ": (NARROW, {}, "12 and the teacher's 16.*--hidden_projection.*--hidden_cosine_weight 0"),
    "embeddings that differ": (NARROW, {"embedding_weight": 1.0, "hidden_cosine_weight": 0.0}, "--embedding_weight 0"),
    "a word for a map": (ALIKE, {"layer_map": "sideways"}, "--layer_map sideways must be uniform, last"),
    "half a pair": (ALIKE, {"relation_layer_map": "1:0,3"}, "--relation_layer_map 1:0,3 must be uniform"),
    "a layer twice": (ALIKE, {"layer_map": "1:0,3:0"}, "names a layer of the student more than once"),
    "a student's layer too many": (ALIKE, {"layer_map": "0:2", "patient_weight": 1.0}, "student has no layer 2"),
    "a teacher's layer too many": (
        ALIKE,
        {"relation_layer_map": "4:0", "relation_weight": 1.0},
        "--relation_layer_map 4:0: the teacher has no layer 4, its layers are 0 to 3",
    ),
    "heads that do not divide": (
        NARROW,
        {"hidden_cosine_weight": 0.0, "relation_weight": 1.0, "relation_heads": 8},
        "8 relation heads .*divide the 12 numbers of a token's query in the student",
    ),
    "a relation that there is not": (ALIKE, {"relations": "query,words"}, "no 'words'; there are attention, query"),
    "a relation twice": (ALIKE, {"relations": "key,key"}, "more than once"),
    "no heads": (ALIKE, {"relation_heads": 0}, "--relation_heads 0 must be at least 1"),
    "heads of nothing": (ALIKE, {"relation_heads": 2}, "--relation_weight is 0, and nothing is related"),
    "other heads": (
        (bert(2, 16, 4), bert(4, 16, 2)),
        {"attention_weight": 1.0},
        "--attention_weight .* 4 attention heads and the teacher 2",
    ),
    "other heads, in relations": (
        (bert(2, 16, 4), bert(4, 16, 2)),
        {"relation_weight": 1.0, "relations": "attention,value"},
        "--relations attention compares head by head",
    ),
    "positions in the attention": (
        (mpnet(), mpnet()),
        {"attention_weight": 1.0},
        "MPNetForSequenceClassification is not made of queries and keys alone",
    ),
    "one that looks back alone": ((bert(2, 16, 2), gpt2()), {"relation_weight": 1.0}, "both ways"),
    "all classes on top": (ALIKE, {"soft_target_loss": "top_k", "soft_target_top_k": 3}, "less than the 3 classes"),
    "decoupled without labels": (
        ALIKE,
        {"soft_target_loss": "decoupled", "distilled_positions": "all"},
        "--distilled_positions masked",
    ),
    "decoupled into nothing": (
        ALIKE,
        {"decoupled_target_weight": 0.0, "decoupled_non_target_weight": 0.0},
        "both 0: nothing would be learned",
    ),
    "beta of 1": (ALIKE, {"jensen_shannon_beta": 1.0}, "--jensen_shannon_beta 1.0 must be between"),
    "a negative weight": (ALIKE, {"relation_weight": -1.0}, "--relation_weight -1.0 must not be negative"),
    "a schedule of half a line": (ALIKE, {"schedules": ["temperature:1"]}, "temperature:1 must be NAME:END:SHAPE"),
    "a schedule of nothing": (ALIKE, {"schedules": ["warmth:1:linear"]}, "no 'warmth' to move; there are temperature"),
    "a schedule of no shape": (ALIKE, {"schedules": ["temperature:1:cubic"]}, "must be linear or cosine"),
    "a schedule too long": (ALIKE, {"schedules": ["temperature:1:linear:1.5"]}, "above 0 and at most 1"),
    "a schedule to the cold": (ALIKE, {"schedules": ["temperature:0:linear"]}, "must end above 0"),
    "a schedule to NaN": (ALIKE, {"schedules": ["patient_weight:nan:linear"]}, "must end at or above 0"),
    "a schedule that stands": (ALIKE, {"schedules": ["temperature:2:linear"]}, "--temperature is 2 already"),
    "two schedules of one": (ALIKE, {"schedules": 2 * ["temperature:1:linear"]}, "names temperature more than once"),
    "a temperature for none": (ALIKE, {"schedules": ["temperature:1:linear"], "soft_target_loss": "mse"}, "no soft t"),
    "hooks that are compiled away": (ALIKE, {"relation_weight": 1.0, "torch_compile": True}, "--torch_compile"),
    "an infinite weight": (ALIKE, {"soft_target_weight": float("inf")}, "inf must not be negative or infinite"),
    "metrics batch by batch": (ALIKE, {"batch_eval_metrics": True}, "--batch_eval_metrics"),
    "a temperature for numbers": (NUMBERS, {"schedules": ["temperature:1:linear"]}, "no distribution to soften"),
    "reentrant checkpoints": (
        ALIKE,
        {
            "relation_weight": 1.0,
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": True},
        },
        "use_reentrant",
    ),
}


@pytest.mark.parametrize(("models", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_models_cannot_give_is_refused(
    tmp_path: Path, models: tuple[PreTrainedModel, PreTrainedModel], flags: dict[str, Any], message: str
) -> None:
    """Prevents an error in the first step, after the teacher has been trained, and terms that mean nothing."""
    with pytest.raises(InputError, match=message) as error:
        build_objective(*models, DistillationArguments(output_dir=str(tmp_path), **flags))
    assert "\n" not in str(error.value)
