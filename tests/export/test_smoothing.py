"""What static int8 does before it rounds: channels evened out, losses made up for, and averages taken back."""

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper, numpy_helper

from prunelle.export.bias_correction import correct_biases
from prunelle.export.compensation import compensate
from prunelle.export.qdq import rounded_matrix, uint8_grid, write_qdq
from prunelle.export.smoothing import smooth

NAMES = ["first", "second"]


def network() -> ModelProto:
    """y = x A + a, and z = x B."""
    draw = np.random.default_rng(0)
    stored = {
        "A": draw.normal(size=(16, 8)).astype(np.float32),
        "B": draw.normal(size=(16, 4)).astype(np.float32),
        "a": draw.normal(size=8).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["xA"], "first"),
        helper.make_node("Add", ["xA", "a"], ["y"]),
        helper.make_node("MatMul", ["x", "B"], ["z"], "second"),
    ]
    shapes = {"y": 8, "z": 4}
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 16])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", size])
            for name, size in shapes.items()
        ],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def inputs(largest: float, count: int = 20, seed: int = 1) -> list[dict[str, np.ndarray]]:
    """Texts of several lengths; one channel is as large as asked."""
    draw = np.random.default_rng(seed)
    sizes = np.ones(16)
    sizes[3] = largest
    return [{"x": (draw.normal(size=(1, 5 + number, 16)) * sizes).astype(np.float32)} for number in range(count)]


def computed(model: ModelProto, batches: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """(tokens, channels) of y and of z."""
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = [session.run(["y", "z"], batch) for batch in batches]
    return [np.concatenate([outputs[each][0] for outputs in found]) for each in range(2)]


def rounded(model: ModelProto, batches: list[dict[str, np.ndarray]]) -> ModelProto:
    """A copy with int8 products whose input has the range that it is seen to have."""
    model = ModelProto.FromString(model.SerializeToString())
    factors = [numpy_helper.to_array(each) for each in model.graph.initializer if each.name.endswith("_factors")]
    values = np.concatenate([batch["x"][0] for batch in batches]) * (factors[0] if factors else 1)
    grid = uint8_grid(float(values.min()), float(values.max()))
    write_qdq(model, dict.fromkeys(NAMES, grid))
    return model


def test_smoothing_changes_nothing_but_what_rounding_loses() -> None:
    """Prevents a file that is 'smoothed' into another function, or one that gains nothing from its extra node."""
    model, batches = network(), inputs(largest=60.0)
    exact = computed(model, batches)
    before = computed(rounded(model, batches), batches)
    assert smooth(model, NAMES, batches) == ["x"]
    for found, expected in zip(computed(model, batches), exact, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    after = computed(rounded(model, batches), batches)
    for expected, one, other in zip(exact, before, after, strict=True):
        assert np.square(other - expected).mean() < 0.5 * np.square(one - expected).mean()


def test_channels_of_one_size_are_left_alone() -> None:
    """Prevents paying for multiplications that spare little."""
    model = network()
    assert smooth(model, NAMES, inputs(largest=1.0)) == []
    assert model == network()


def test_weights_that_something_else_reads_are_left_alone() -> None:
    """Prevents a layer that is used twice from being scaled for one of its inputs."""
    model = network()
    model.graph.node.append(helper.make_node("MatMul", ["x", "A"], ["again"], "third"))
    assert smooth(model, ["first"], inputs(largest=60.0)) == []


def test_weights_make_up_for_what_others_lose() -> None:
    """Prevents matrices changed for inputs that they do not have, the wrong way round, or that something else reads."""
    mixed = np.random.default_rng(2).normal(size=(16, 16)).astype(np.float32)
    batches = [{"x": batch["x"] @ mixed} for batch in inputs(largest=10.0)]
    values = np.concatenate([batch["x"][0] for batch in batches])
    model = network()
    compensate(model, NAMES, batches)
    for before, after in zip(network().graph.initializer[:2], model.graph.initializer[:2], strict=True):
        matrix, changed = numpy_helper.to_array(before), numpy_helper.to_array(after)
        lost, less = (np.square(values @ (rounded_matrix(each) - matrix)).mean() for each in (matrix, changed))
        assert less < 0.5 * lost

    shared = network()
    shared.graph.node.append(helper.make_node("MatMul", ["x", "A"], ["again"], "third"))
    compensate(shared, ["first"], batches)
    assert list(shared.graph.initializer) == list(network().graph.initializer)


def test_biases_take_back_what_is_lost_on_average() -> None:
    """Prevents a correction of the wrong sign, or one averaged over texts in place of tokens; against float64."""
    model, batches = network(), inputs(largest=60.0)
    values = np.concatenate([batch["x"][0] for batch in batches])
    grid = uint8_grid(float(values.min()), 0.5 * float(values.max()))  # what is clipped is lost on average too
    exact = computed(model, batches)
    uncorrected = network()
    write_qdq(uncorrected, dict.fromkeys(NAMES, grid))
    lost = (exact[0].astype(np.float64) - computed(uncorrected, batches)[0]).mean(0)
    assert np.abs(lost).max() > 0.1

    correct_biases(model, {"x": grid}, NAMES, batches, {})
    bias, before = (
        next(numpy_helper.to_array(each) for each in made.graph.initializer if each.name == "a")
        for made in (model, network())
    )
    np.testing.assert_allclose(bias, before + lost, rtol=1e-4, atol=1e-4)
    write_qdq(model, dict.fromkeys(NAMES, grid))
    np.testing.assert_allclose(computed(model, batches)[0].mean(0), exact[0].mean(0), rtol=1e-3, atol=1e-3)


def test_a_bias_of_several_readers_is_left_alone() -> None:
    """Prevents one module's correction from shifting another."""
    model, shared = network(), helper.make_node("Neg", ["a"], ["negative"])
    model.graph.node.append(shared)
    before = model.SerializeToString(deterministic=True)
    correct_biases(model, {"x": (1.0, 128)}, NAMES, inputs(largest=60.0), {})
    assert model.SerializeToString(deterministic=True) == before
