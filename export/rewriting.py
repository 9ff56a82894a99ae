"""What the exporter writes, in the form that onnxruntime computes fastest."""

from onnx import ModelProto, NodeProto, helper

SPLIT = [0, 2, 1, 3]  # (batch, length, heads, size) to (batch, heads, length, size), and back


def merge_heads(proto: ModelProto) -> None:
    """Gives attention its queries, keys and values as linear layers leave them, in place.

    Traced, they are transposed to (batch, heads, length, size), and what comes out is transposed back: four copies a
    layer. The operator takes (batch, length, heads * size) as well when it is told how many heads there are, and reads
    each head where it lies. Where something else stands between, such as rotary positions, nothing is changed.
    """
    if any(attribute.HasField("g") for node in proto.graph.node for attribute in node.attribute):
        return  # what inner graphs read is not looked for
    graph = _Graph(proto)
    for node in [node for node in proto.graph.node if node.op_type == "Attention"]:
        if len(node.input) > 4 or len(node.output) > 1:  # it takes or gives a cache
            continue
        wholes = [graph.before_split(name) for name in node.input[:3]]
        merged = graph.after_merge(node.output[0])
        if merged is None or None in wholes:
            continue
        heads = [graph.shapes[name][1] for name in node.input[:2]]
        node.input[:3] = wholes
        node.output[0] = merged.output[0]
        proto.graph.node.remove(merged)
        node.attribute.extend(
            helper.make_attribute(name, count)
            for name, count in zip(("q_num_heads", "kv_num_heads"), heads, strict=True)
        )
    _drop_unread(proto)


def add_by_sum(proto: ModelProto) -> None:
    """Has what a layer norm reads added by Sum, in place.

    onnxruntime makes Add and LayerNormalization one node, SkipLayerNormalization, whose kernel for CPUs takes several
    times as long as the two: 4.6 ms instead of 0.7 for 16 x 128 x 384 on one thread (1.31.1). Sum it leaves alone.
    """
    normalized = {node.input[0] for node in proto.graph.node if node.op_type == "LayerNormalization"}
    for node in proto.graph.node:
        if node.op_type == "Add" and node.output[0] in normalized:
            node.op_type = "Sum"


def sum_by_add(proto: ModelProto) -> None:
    """Undoes `add_by_sum`, in place."""
    for node in proto.graph.node:
        if node.op_type == "Sum" and len(node.input) == 2:
            node.op_type = "Add"


class _Graph:
    def __init__(self, proto: ModelProto) -> None:
        self.maker = {name: node for node in proto.graph.node for name in node.output}
        self.readers = {output.name: [NodeProto()] for output in proto.graph.output}  # the caller reads it
        for node in proto.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        known = [*proto.graph.input, *proto.graph.value_info, *proto.graph.output]
        # Free dimensions are 0.
        self.shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in known}

    def before_split(self, name: str) -> str | None:
        """The (batch, length, heads * size) tensor that is split into these (batch, heads, length, size)."""
        transposed = self.maker.get(name)
        if transposed is None or not _swaps_heads(transposed):
            return None
        viewed = self.maker.get(transposed.input[0])
        if viewed is None or viewed.op_type != "Reshape":
            return None
        return viewed.input[0] if self._same(viewed.input[0], viewed.output[0]) else None

    def after_merge(self, name: str) -> NodeProto | None:
        """The node that makes (batch, length, heads * size) of these (batch, heads, length, size), if all read it."""
        transposed = self.readers.get(name, [])
        if len(transposed) != 1 or not _swaps_heads(transposed[0]):
            return None
        viewed = self.readers.get(transposed[0].output[0], [])
        if len(viewed) != 1 or viewed[0].op_type != "Reshape":
            return None
        return viewed[0] if self._same(viewed[0].output[0], viewed[0].input[0]) else None

    def _same(self, whole: str, parts: str) -> bool:
        """Whether the one is (batch, length, heads * size) and the other (batch, length, heads, size)."""
        one, other = self.shapes.get(whole, []), self.shapes.get(parts, [])
        return len(one) == 3 and len(other) == 4 and 0 < one[2] == other[2] * other[3]


def _swaps_heads(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and [list(attribute.ints) for attribute in node.attribute] == [SPLIT]


def _drop_unread(proto: ModelProto) -> None:
    """Removes nodes and stored tensors that nothing reads any more, and what was known of them."""
    graph = proto.graph
    while True:
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        unread = [node for node in graph.node if not read.intersection(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    known = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    for value in [value for value in graph.value_info if value.name not in known]:
        graph.value_info.remove(value)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
