"""Small ONNX files in the form of tools/export.py's."""

import numpy as np
import onnx


def save_constant_detector(path, **metadata):
    """An ONNX file with the inputs and outputs of ours, which finds one object in any image."""

    def constant(name, values, kind):
        tensor = onnx.helper.make_tensor(name, kind, values.shape, values.flatten().tolist())
        return onnx.helper.make_node("Constant", [], [name], value=tensor)

    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            constant("boxes", np.array([[[10.0, 20, 40, 50]]]), float32),
            constant("scores", np.array([[0.75]]), float32),
            constant("classes", np.array([[1]]), int64),
        ],
        "constant",
        [info("images", float32, [1, 3, "h", "w"]), info("image_sizes", int64, [1, 2])],
        [
            info("boxes", float32, [1, 1, 4]),
            info("scores", float32, [1, 1]),
            info("classes", int64, [1, 1]),
        ],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
