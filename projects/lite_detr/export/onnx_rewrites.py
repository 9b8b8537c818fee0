"""Rewrites of an ONNX graph: simpler, and so that tools that convert ONNX files take it."""

import numpy as np
import onnx.version_converter
import onnx_ir
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    LiftConstantsToInitializersPass,
)
from onnxscript.optimizer import fold_constants, remove_unused_nodes

# Name of the constant whose type CastLike casts to.
FLOAT_LIKE = "float_like"


def simplify(model: onnx_ir.Model) -> None:
    """Fold constants, merge equal subexpressions and make constants initializers, in place."""
    fold_constants(model)
    remove_unused_nodes(model)
    CommonSubexpressionEliminationPass()(model)
    remove_unused_nodes(model)
    # Version converters refuse constants that are attributes of nodes.
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def make_convertible(model: ModelProto) -> None:
    """Remove from a model what converters of types and of versions stumble over, in place.

    - Converters to 16 bits change the types of constants, but not those that nodes cast to:
      ``CastLike`` takes its type from a constant.
    - Converters to earlier versions keep attributes that exist since opset 18, though they are at
      their default.
    - The exporter writes sizes as formulas, and beside each node the paths of the source code.
    """
    graph = model.graph
    del graph.value_info[:]
    for node in graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if "noop_with_empty_axes" in attributes and not attributes["noop_with_empty_axes"].i:
            node.attribute.remove(attributes["noop_with_empty_axes"])
        if node.op_type == "Cast" and attributes["to"].i == TensorProto.FLOAT:
            node.op_type = "CastLike"
            node.input.append(FLOAT_LIKE)
            del node.attribute[:]
    graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), FLOAT_LIKE))


def convert_opset(model: ModelProto, opset: int) -> ModelProto:
    """Return a model in another version of the standard operators, 16 or later."""
    if opset < 17:
        decompose_layer_norms(model)
    return onnx.version_converter.convert_version(model, opset)


def decompose_layer_norms(model: ModelProto) -> None:
    """Replace layer norms over the last dimension by operators of opset 16, in place.

    The order is that in which ONNX Runtime recognises a layer norm, and runs it as one.
    """
    graph = model.graph
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        graph.node.extend(
            decompose(node, graph) if node.op_type == "LayerNormalization" else [node]
        )


def decompose(node: NodeProto, graph: onnx.GraphProto) -> list[NodeProto]:
    x, scale, *bias = node.input
    [output] = node.output
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    names = {}
    for name, value in (("axes", [-1]), ("two", 2.0), ("epsilon", epsilon)):
        names[name] = f"{output}_{name}"
        dtype = np.int64 if name == "axes" else np.float32
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), names[name]))
    steps = [
        ("ReduceMean", [x, names["axes"]], "mean"),
        ("Sub", [x, f"{output}_mean"], "centred"),
        ("Pow", [f"{output}_centred", names["two"]], "squared"),
        ("ReduceMean", [f"{output}_squared", names["axes"]], "variance"),
        ("Add", [f"{output}_variance", names["epsilon"]], "shifted"),
        ("Sqrt", [f"{output}_shifted"], "deviation"),
        ("Div", [f"{output}_centred", f"{output}_deviation"], "normalised"),
        ("Mul", [f"{output}_normalised", scale], "scaled"),
    ]
    nodes = [
        helper.make_node(kind, inputs, [f"{output}_{name}"], name=f"{node.name}_{name}")
        for kind, inputs, name in steps
    ]
    if bias:
        nodes.append(helper.make_node("Add", [f"{output}_scaled", *bias], [output], name=node.name))
    else:
        nodes[-1].output[0] = output
    return nodes
