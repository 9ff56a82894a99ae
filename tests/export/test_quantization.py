import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from prunelle.export import quantize_dynamic


@pytest.fixture(params=["classifier", "language_model"])
def exported(request):
    return request.getfixturevalue(request.param)


def test_int8_file_is_small_valid_and_close(exported, tmp_path):
    """A quantizer that skips operators leaves float32 weights in, and one that misreads them ruins them."""
    file = quantize_dynamic(exported.file, tmp_path / "model_quantized.onnx")
    onnx.checker.check_model(file, full_check=True)
    graph = onnx.load(file).graph
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 1]
    assert {tensor.data_type for tensor in matrices} <= {
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT64,
    }
    operators = {node.op_type for node in graph.node}
    assert "MatMulInteger" in operators
    assert not {"MatMul", "Gemm"} & operators

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    difference, scale = [], []
    for rows, length in [(1, 1), (1, 48), (5, 16)]:
        words = torch.arange(rows * length).reshape(rows, length) * 7 % 290 + 5
        inputs = {
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
            "token_type_ids": torch.zeros_like(words),
        }
        with torch.inference_mode():
            expected = exported.model(**inputs).logits.numpy()
        (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        difference.append(np.abs(logits - expected).max())
        scale.append(np.abs(expected).max())
    # 32 hidden units average little of the rounding away; a wrong scale would miss by far more.
    assert max(difference) < 0.1 * max(scale)


def test_large_weights_do_not_saturate(tmp_path):
    """Processors without int8 instructions add pairs of products in 16 bits, which large ones overflow."""
    weight = np.ones((64, 8), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], "product")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, tmp_path / "product.onnx")
    file = quantize_dynamic(tmp_path / "product.onnx", tmp_path / "int8.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (product,) = session.run(["y"], {"x": np.ones((2, 64), dtype=np.float32)})
    np.testing.assert_allclose(product, 64.0, rtol=1e-3)
