from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from prunelle.export import (
    VARIANTS,
    ExportError,
    convert_to_fp16,
    export_variants,
    quantize_int4,
    quantize_static,
)


def batches(count=8, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        words = torch.randint(5, 300, (1, length), generator=generator)
        yield {
            "input_ids": words,
            "attention_mask": torch.ones_like(words),
            "token_type_ids": torch.zeros_like(words),
        }


def static(source, target):
    return quantize_static(source, target, batches=list(batches()))


def logits(file, batch):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {name: np.asarray(tensor) for name, tensor in batch.items()})[0]


@pytest.fixture(params=["classifier", "language_model"])
def exported(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("convert", "correlation"), [(convert_to_fp16, 0.9999), (static, 0.98), (quantize_int4, 0.9)])
def test_close_to_the_float_file_and_smaller(exported, convert, correlation, tmp_path):
    """A scale, an axis or a zero point gone wrong gives logits of the right shape and of no use."""
    file = convert(exported.file, tmp_path / "converted.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert file.stat().st_size < exported.file.stat().st_size
    pairs = [(logits(exported.file, batch), logits(file, batch)) for batch in batches(count=20, seed=1)]
    assert all(found.dtype == np.float32 and found.shape == expected.shape for expected, found in pairs)
    expected, found = (np.concatenate([each.ravel() for each in side]) for side in zip(*pairs, strict=True))
    assert np.corrcoef(expected, found)[0, 1] > correlation


def test_half_precision_holds_no_float32_weights(exported, tmp_path):
    """A converter that passes weights over leaves a file that is half precision in its name."""
    graph = onnx.load(convert_to_fp16(exported.file, tmp_path / "fp16.onnx")).graph
    assert TensorProto.FLOAT not in {tensor.data_type for tensor in graph.initializer}


def test_the_static_file_computes_in_int8(exported, tmp_path):
    """What onnxruntime does not fuse it computes in float32, converting the weights at every run."""
    file = static(exported.file, tmp_path / "static.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert operators["MatMulIntegerToFloat"]
    assert not {"MatMul", "Gemm"} & set(operators)


def test_the_static_file_gives_a_text_what_it_gives_it_alone(classifier, tmp_path):
    """Ranges taken from the batch let one text change another's prediction; fixed ranges must not."""
    file = static(classifier.file, tmp_path / "static.onnx")
    single = list(batches(count=3, seed=2))
    together = {name: torch.cat([batch[name] for batch in single]) for name in single[0]}
    alone = np.concatenate([logits(file, batch) for batch in single])
    np.testing.assert_allclose(logits(file, together), alone, atol=1e-5)


def test_linear_layers_have_4_bits(exported, tmp_path):
    """Embeddings left in float32 would make the 4-bit file of a small model larger than its int8 file."""
    graph = onnx.load(quantize_int4(exported.file, tmp_path / "int4.onnx", block_size=16)).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    settings = [{a.name: a.i for a in node.attribute} for node in products]
    assert {(each["bits"], each["block_size"]) for each in settings} == {(4, 16)}
    assert "MatMul" not in {node.op_type for node in graph.node}
    tables = [tensor for tensor in graph.initializer if list(tensor.dims) == [300, 32]]
    assert {tensor.data_type for tensor in tables} == {TensorProto.INT8}


def test_only_what_was_asked_for_is_left(make_bert, tmp_path):
    """The float32 file that the others are made of would be deployed by mistake."""
    files = export_variants(make_bert(), tmp_path, ["int4", "int8-dynamic"])
    assert list(files) == ["int8-dynamic", "int4"]
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")} == {
        VARIANTS["int8-dynamic"].file,
        VARIANTS["int4"].file,
    }


def test_a_model_that_overflows_float16_is_not_exported_to_it(make_bert, tmp_path):
    """A float16 file is computed in float32 here and answers infinity on the user's GPU."""
    model = make_bert()
    model.bert.encoder.layer[0].attention.self.value.weight.data *= 1e5
    with pytest.raises(ExportError, match=r"float16 ends at 65,504, and \S+ reaches \d+,\d+"):
        export_variants(model, tmp_path, ["fp32", "fp16"])
    assert [path.name for path in tmp_path.rglob("*.onnx")] == ["model.onnx"]
