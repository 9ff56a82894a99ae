"""Which module of the PyTorch model a node of an ONNX file was traced in."""

import ast

from onnx import ModelProto, NodeProto

SCOPES = "pkg.torch.onnx.name_scopes"
STACK = "pkg.torch.onnx.stack_trace"


def modules_around(node: NodeProto) -> list[str]:
    """Qualified names of the modules that a node of `export_onnx` was traced in, the outermost, "", first.

    Empty where it was in none.
    """
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    # From the wrapper that gives logits alone, and calls the model `model`, to the operation itself.
    return [name.removeprefix("model").removeprefix(".") for name in ast.literal_eval(scopes)[1:-1]]


def module_of(node: NodeProto) -> str:
    """The innermost of them, empty where a node was traced in none."""
    return next(reversed(modules_around(node)), "")


def remove_stacks(proto: ModelProto) -> None:
    """Takes out where in the sources each node was traced: files of the machine that exported the model."""
    for node in proto.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key != STACK]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
