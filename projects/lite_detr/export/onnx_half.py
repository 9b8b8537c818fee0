"""Mixed precision for an ONNX graph: layers in float16, geometry and scores in float32.

A detector that is all in 16 bits gives wrong boxes: float16 has 11 bits, so a coordinate above 1024
pixels is off by up to half a pixel, and each layer of the decoder adds to it.

In DINO and H-DETR a query's content belongs to its rank, so features in 16 bits, which rank some
proposals differently, give those other detections. Only what comes after the choice of proposals
can be in 16 bits without that.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
# Layers with weights, which take nearly all of the time and of the file.
LAYERS = {"Conv", "Gemm", "MatMul"}
# As in PyTorch's autocast: sums over many values, exponentials, waves. Runtimes sample a map at
# locations of its own type.
SENSITIVE = {
    "Cos",
    "Exp",
    "GridSample",
    "InstanceNormalization",
    "LayerNormalization",
    "Log",
    "Pow",
    "ReduceLogSumExp",
    "ReduceMean",
    "Sin",
    "Softmax",
}
# The inputs that hold sampling locations, scores of proposals, and coordinates.
EXACT_INPUTS = {"GridSample": 1, "TopK": 0, "Sin": 0, "Cos": 0}
# The results of these are features, neither scores nor coordinates.
FEATURES = {"GridSample", "InstanceNormalization", "LayerNormalization", "Softmax"}


def convert_to_half(model: ModelProto, decoder_only: bool = False) -> None:
    """Convert a float32 model in place; inputs and outputs stay as they are.

    Args:
        model: of a detector.
        decoder_only: keep all that leads to the choice of proposals in float32. A detector that
            chooses none is converted as a whole.

    Raises:
        ValueError: the type of a value cannot be inferred.
    """
    graph = model.graph
    floats = float_values(model)
    kept = kept_nodes(graph)
    if decoder_only:
        kept |= before_choices(graph)
    halves = {
        name for node in graph.node if node.output[0] not in kept for name in node.output
    } & floats
    constants = {tensor.name: tensor for tensor in graph.initializer}
    # Each value has one type, so it has at most one copy, in the other type.
    copies: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        kind = FLOAT if node.output[0] in kept else HALF
        for i, name in enumerate(node.input):
            if name not in floats or kind == (HALF if name in halves else FLOAT):
                continue
            if name not in copies:
                copies[name] = copy = f"{name}_{'half' if kind == HALF else 'float'}"
                if name in constants:
                    graph.initializer.append(half_tensor(constants[name], copy))
                else:
                    cast = helper.make_node("Cast", [name], [copy], name=f"node_{copy}", to=kind)
                    nodes.append(cast)
            node.input[i] = copies[name]
        nodes.append(node)
    del graph.value_info[:], graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def float_values(model: ModelProto) -> set[str]:
    """Return the names of all float32 values, constants and inputs included.

    Raises:
        ValueError: the type of a value cannot be inferred.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for values in (graph.input, graph.value_info, graph.output):
        kinds |= {value.name: value.type.tensor_type.elem_type for value in values}
    unknown = [name for node in graph.node for name in node.output if not kinds.get(name)]
    if unknown:
        raise ValueError(f"the type of {unknown[0]} is not known")
    return {name for name, kind in kinds.items() if kind == FLOAT}


def kept_nodes(graph: onnx.GraphProto) -> set[str]:
    """Return the nodes that stay in float32, by their first outputs.

    - what no layer comes before: normalising of pixels, positions, sizes;
    - sums and exponentials, as in PyTorch's autocast, and sampling;
    - sampling locations, and scores and boxes of proposals and detections, from the last layer
      before them on.
    """
    producers = {name: node for node in graph.node for name in node.output}
    layers = {node.output[0] for node in graph.node if node.op_type in LAYERS}
    after: set[str] = set()
    kept: set[str] = set()
    for node in graph.node:
        if node.output[0] in layers or after.intersection(node.input):
            after.update(node.output)
        else:
            kept.add(node.output[0])
        if node.op_type in SENSITIVE:
            kept.add(node.output[0])
    ends = [value.name for value in graph.output]
    for node in graph.node:
        if node.op_type in EXACT_INPUTS:
            ends.append(node.input[EXACT_INPUTS[node.op_type]])
    kept.update(node.output[0] for node in since_last_layers(ends, producers))
    return kept


def before_choices(graph: onnx.GraphProto) -> set[str]:
    """Return the nodes that lead to each TopK but the last, which chooses the detections."""
    producers = {name: node for node in graph.node for name in node.output}
    *choices, _ = (node for node in graph.node if node.op_type == "TopK")
    pending, found = [name for node in choices for name in node.input], set()
    while pending:
        node = producers.get(pending.pop())
        if node is not None and node.output[0] not in found:
            found.add(node.output[0])
            pending.extend(node.input)
    return found


def since_last_layers(names: list[str], producers: dict[str, NodeProto]) -> Iterator[NodeProto]:
    """Yield the nodes that lead to values, back to layers, which are included, and to features."""
    pending, seen = list(names), set()
    while pending:
        node = producers.get(pending.pop())
        if node is None or node.output[0] in seen or node.op_type in FEATURES:
            continue
        seen.add(node.output[0])
        yield node
        if node.op_type not in LAYERS:
            pending.extend(node.input)


def half_tensor(tensor: TensorProto, name: str) -> TensorProto:
    """Return a constant in float16; what it cannot hold becomes its largest number."""
    limit = np.finfo(np.float16).max
    values = numpy_helper.to_array(tensor).clip(-limit, limit)
    return numpy_helper.from_array(values.astype(np.float16), name)
