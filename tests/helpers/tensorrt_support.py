"""The operators of ONNX that TensorRT's parser accepts, as it documents them.

The table holds facts of ``operators.md`` in onnx-tensorrt, for TensorRT 10.1. They were compared,
not run: that needs a GPU. The types are those of an operator's data, not of its shapes and indices.
"""

from collections.abc import Iterator

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

OPSETS = range(9, 21)
FLOATS = {"FLOAT", "FLOAT16"}
NUMBERS = FLOATS | {"INT32", "INT64"}
ANY = NUMBERS | {"BOOL"}
TYPES = {
    kind: types
    for kinds, types in (
        ("And Not Or", {"BOOL"}),
        ("BatchNormalization Ceil Clip Conv Cos CumSum Exp Floor Gemm GlobalMaxPool", FLOATS),
        ("GridSample InstanceNormalization LayerNormalization Log MatMul MaxPool Pow", FLOATS),
        ("Reciprocal Sigmoid Sin Softmax Sqrt", FLOATS),
        ("Abs Add Div Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Neg Range", NUMBERS),
        ("ReduceLogSumExp ReduceMax ReduceMean ReduceSum Relu Sub TopK", NUMBERS),
        ("Cast CastLike Concat Expand Gather GatherElements GatherND Reshape Shape Slice", ANY),
        ("Split Squeeze Tile Transpose Unsqueeze Where", ANY),
        # The page omits booleans; the parser's check of types has no limits for it.
        ("Equal", ANY),
    )
    for kind in kinds.split()
}
# Inputs that have to be constants.
CONSTANTS = {"CumSum": 1, "Slice": 3, "Squeeze": 1, "TopK": 1, "Unsqueeze": 1}
LARGEST_K = 3840


def refusals(model: ModelProto) -> Iterator[str]:
    """Yield a line for each node that TensorRT does not take, by its documentation."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    kinds |= {tensor.name: tensor.data_type for tensor in constants.values()}
    [opset] = model.opset_import
    if opset.domain or opset.version not in OPSETS:
        yield f"opset {opset.domain} {opset.version}"
    for node in graph.node:
        data = node.input[node.op_type == "Where"]
        kind = TensorProto.DataType.Name(kinds.get(data, 0))
        if kind not in TYPES.get(node.op_type, ()):
            yield f"{node.name}: {node.op_type} of {kind}"
        place = 1 if node.op_type.startswith("Reduce") else CONSTANTS.get(node.op_type)
        if place is not None and node.input[place:] and node.input[place] not in constants:
            yield f"{node.name}: input {place} of {node.op_type} is not a constant"
        yield from attribute_problems(node, ranks, constants)


def attribute_problems(
    node: NodeProto, ranks: dict[str, int], constants: dict[str, TensorProto]
) -> Iterator[str]:
    given = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if node.op_type in ("LayerNormalization", "MaxPool") and len(node.output) > 1:
        yield f"{node.name}: {node.op_type} with several results"
    if node.op_type == "MaxPool" and set(given.get("dilations", ())) - {1}:
        yield f"{node.name}: MaxPool with dilations"
    # A mode that the parser does not know becomes nearest: since opset 20 it is called linear.
    if node.op_type == "GridSample" and (
        given["mode"] != b"bilinear" or {ranks.get(name) for name in node.input} != {4}
    ):
        yield f"{node.name}: GridSample by {given['mode']} of {[*map(ranks.get, node.input)]}"
    if node.op_type == "TopK" and node.input[1] in constants:
        number = numpy_helper.to_array(constants[node.input[1]]).item()
        if number >= LARGEST_K or not given.get("sorted", 1):
            yield f"{node.name}: TopK of {number}, sorted: {given.get('sorted', 1)}"
