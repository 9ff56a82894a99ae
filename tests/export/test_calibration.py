import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prunelle.errors import InputError
from prunelle.export import activation_ranges, calibration_batches

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(200))]


@pytest.fixture
def words():
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def test_texts_are_drawn_from_the_whole_file_and_never_padded(words):
    """The first texts of a sorted file are of one class; padding has activations that nothing ever reads."""
    texts = [" ".join([f"w{number}"] * (1 + number % 5)) for number in range(200)] + ["", "  ", None]
    batches = calibration_batches(texts, words, samples=50, length=4)
    first_words = [batch["input_ids"][0, 1] for batch in batches]
    assert len(set(first_words)) == 50
    assert max(first_words) > 150
    assert {batch["input_ids"].shape[1] for batch in batches} == {3, 4}
    assert all(batch["attention_mask"].all() for batch in batches)
    again = calibration_batches(texts, words, samples=50, length=4)
    assert [batch["input_ids"].tolist() for batch in batches] == [batch["input_ids"].tolist() for batch in again]


def test_pairs_are_read_together(words):
    """One text of a pair alone has other activations than what the model will see."""
    (batch,) = calibration_batches([("w1 w2", "w3"), ("w4", " ")], words, samples=5, length=16)
    assert batch["input_ids"].tolist() == [words("w1 w2", "w3")["input_ids"]] != [words("w1 w2")["input_ids"]]


def test_masked_language_models_are_calibrated_with_masks(words):
    """Activations at a mask are of a kind of their own, and the only ones whose prediction counts."""
    batches = calibration_batches(["w1 w2 w3 w4"] * 100, words, samples=100, length=16, masked=0.25)
    rows = np.concatenate([batch["input_ids"] for batch in batches])
    assert (rows[:, 0] == words.cls_token_id).all()
    assert (rows[:, -1] == words.sep_token_id).all()
    assert 0.15 < (rows[:, 1:-1] == words.mask_token_id).mean() < 0.35


def test_nothing_to_calibrate_on(words):
    """Ranges of nothing are infinite, and a file with them answers NaN."""
    with pytest.raises(InputError, match="no text to calibrate on"):
        calibration_batches(["", " "], words, samples=5, length=8)


@pytest.fixture
def doubled():
    """y = 2x, where `inner` is 2x before it is put out."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["inner"]), helper.make_node("Identity", ["inner"], ["y"])],
        "doubled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "columns"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "columns"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def range_of(model, values, method, parts=4):
    """values: (n,). Given in batches of different sizes, along with an input that the model does not take."""
    batches = [{"x": part[None].astype(np.float32), "labels": 0} for part in np.array_split(values, parts)]
    ((low, high),) = activation_ranges(model, ["inner"], batches, method)
    return low, high


def test_minmax_is_what_was_seen(doubled):
    """A range of the last batch alone clips everything else."""
    assert range_of(doubled, np.array([1.0, -3.0, 2.0, 0.5]), "minmax") == (-6.0, 4.0)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_a_far_value_is_clipped_and_the_rest_kept(doubled, method):
    """One outlier that stretches the range leaves a handful of steps for everything else."""
    bulk = np.random.default_rng(0).normal(size=100_000)
    low, high = range_of(doubled, np.append(bulk, 100.0), method)
    assert -2 * 5 < low < -2 * 3
    assert 2 * 3 < high < 2 * 8


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_even_values_are_kept(doubled, method):
    """A method that clips where there is no outlier throws away what it was to preserve."""
    values = np.random.default_rng(0).uniform(-0.1, 1.0, 50_000)
    low, high = range_of(doubled, values, method)
    assert low == pytest.approx(-0.2, abs=0.02)
    assert high == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_the_order_of_the_texts_does_not_matter(doubled, method):
    """Histograms that grow as they go depend on which batch came first."""
    values = np.random.default_rng(1).normal(size=4_000) ** 3
    assert range_of(doubled, values, method) == range_of(doubled, values[::-1], method, parts=7)


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_a_constant_tensor_has_a_range(doubled, method):
    """A division by the width of nothing would end in NaN."""
    low, high = range_of(doubled, np.zeros(20), method)
    assert np.isfinite([low, high]).all()
