import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from prunelle.compression.record import write_record
from prunelle.errors import InputError
from prunelle.export import quantize_dynamic
from prunelle.export.weights import onnx_weights, read_onnx, torch_weights


def with_external_data(folder, location):
    """An ONNX file of one 20 x 30 matrix product whose matrix stands in another file."""
    weight = numpy_helper.from_array(np.ones((20, 30), dtype=np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["logits"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 20])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 30])],
        [weight],
    )
    folder.mkdir(exist_ok=True)
    onnx.save(
        helper.make_model(graph), folder / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=0
    )
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.parametrize("location", ["../w.data", "/etc/hostname", "deeper/../../w.data", "."])
def test_weights_outside_the_folder_are_refused(location, tmp_path):
    """A file from elsewhere could make its reader's own files part of what is published."""
    with pytest.raises(InputError, match="not in its folder"):
        read_onnx(with_external_data(tmp_path / "model", location))


def test_weights_beside_the_file_are_counted(tmp_path):
    """A two-kilobyte graph beside two gigabytes of weights is no small model."""
    file = with_external_data(tmp_path, "w.data")
    weights = onnx_weights(file)
    assert weights.size_bytes == file.stat().st_size + (tmp_path / "w.data").stat().st_size
    assert weights.parameters == weights.nonzero_parameters == 600
    (tmp_path / "w.data").unlink()
    with pytest.raises(InputError, match=r"no file .*w\.data"):
        read_onnx(file)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x01"])
def test_what_is_no_onnx_file_is_named(content, tmp_path):
    """Protobuf reads an empty file as an empty model."""
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match="is not an ONNX file"):
        read_onnx(tmp_path / "model.onnx")


def test_zeros_are_counted_in_every_format(make_bert, classifier, tmp_path):
    """Zeros of a quantized file are its zero points; counted as 0 they make a dense model look sparse, or reverse."""
    model = make_bert()
    dense = torch_weights(model, None)
    assert dense.size_bytes == pytest.approx(4 * dense.parameters, rel=0.01)
    assert dense.compressed_bytes < dense.size_bytes
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight.zero_()
    pruned = torch_weights(model, None)
    assert pruned.parameters == dense.parameters
    assert dense.nonzero_parameters - pruned.nonzero_parameters == 32 * 64
    assert pruned.compressed_bytes < dense.compressed_bytes

    fp32 = onnx_weights(classifier.file)
    int8 = onnx_weights(quantize_dynamic(classifier.file, tmp_path / "int8.onnx"))
    assert (fp32.format, int8.format) == ("onnx", "onnx-int8")
    for weights in (fp32, int8):
        # The exporter stores equal tensors once, as the zeros that a fresh model's biases are.
        assert weights.parameters == pytest.approx(dense.parameters, rel=0.02)
        assert weights.nonzero_parameters == pytest.approx(dense.nonzero_parameters, rel=0.03)


def test_density_is_that_of_the_pruning(make_bert, tmp_path):
    """A dense model drawn as if it had been pruned; and one whose zeros were taken out drawn as if it had not."""
    model = make_bert()
    assert torch_weights(model, None).density == {}
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    with torch.no_grad():
        model.get_parameter(name)[:16] = 0
    assert torch_weights(model, None).density[name] == 0.75
    write_record(tmp_path, density={name: 0.5}, kept_layers=[0])
    weights = torch_weights(model, tmp_path)
    assert (weights.density, weights.kept_layers) == ({name: 0.5}, [0])


def test_a_checkpoint_counts_its_files_and_bfloat16_its_tensors(make_bert, tmp_path):
    """The size in memory is not what is shipped."""
    model = make_bert()
    model.save_pretrained(tmp_path)
    assert torch_weights(model, tmp_path).size_bytes == (tmp_path / "model.safetensors").stat().st_size
    shutil.rmtree(tmp_path)
    half = torch_weights(model.to(torch.bfloat16), tmp_path)
    assert half.size_bytes == pytest.approx(2 * half.parameters, rel=0.02)
