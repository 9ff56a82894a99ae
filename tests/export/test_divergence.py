"""A message that blames the wrong layer costs its reader more time than none."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from prunelle.export import ExportError
from prunelle.export.origin import modules_around
from prunelle.export.verification import verify_onnx


def damage(file: Path, module: str, factor: float) -> onnx.ModelProto:
    """The model with one node more in the module, `damaged`, that multiplies what it gives."""
    proto = onnx.load(file)
    place, node = [pair for pair in enumerate(proto.graph.node) if module in modules_around(pair[1])][-1]
    (name,) = node.output
    node.output[0] = f"sound_{name}"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(factor), "factor"))
    made = onnx.helper.make_node("Mul", [f"sound_{name}", "factor"], [name], "damaged")
    made.metadata_props.extend(node.metadata_props)
    proto.graph.node.insert(place + 1, made)
    return proto


@pytest.mark.parametrize("factor", [1.5, np.nan])
@pytest.mark.parametrize(
    ("module", "blamed"),
    [
        ("bert.embeddings.word_embeddings", "the output of bert.embeddings.word_embeddings"),
        ("bert.encoder.layer.0.attention.self", "the output of bert.encoder.layer.0.attention.self"),
        ("bert.encoder.layer.0.output.dense", "the output of bert.encoder.layer.0.output.dense"),
        ("classifier", "logits"),
    ],
)
def test_the_node_where_file_and_model_part_is_named(
    classifier: Any, tmp_path: Path, module: str, blamed: str, factor: float
) -> None:
    """All layers after the damaged one differ too, most of all the last one."""
    file = tmp_path / "damaged.onnx"
    onnx.save(damage(classifier.file, module, factor), file)
    with pytest.raises(ExportError, match=rf"; they part at node damaged \(Mul\), which gives {re.escape(blamed)}$"):
        verify_onnx(classifier.model, file)


def test_no_path_of_the_exporting_machine_is_in_the_file(classifier: Any) -> None:
    """The exporter notes beside each node in which file of which home folder it was traced."""
    assert b'.py", line' not in classifier.file.read_bytes()
