"""ONNX files of one or two nodes."""

import onnx
from onnx import TensorProto, helper

FLOAT, FLOAT16, UINT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8


def write_network(path, scale=0.5, kind=FLOAT, shape=None, names=("input", "output"), metadata=None, finite=False):
    """An ONNX file that multiplies by `scale`. metadata None: a size multiple of 8. `finite`: it has that output."""
    shape = shape or ((1, "H", "W", 3) if kind == UINT8 else (1, 3, "H", "W"))
    x, y = names
    nodes = [
        helper.make_node("Cast", [x], ["a"], to=FLOAT),
        helper.make_node("Mul", ["a", "scale"], ["b"]),
        helper.make_node("Cast", ["b"], [y], to=kind),
    ]
    constants = [helper.make_tensor("scale", FLOAT, [], [scale])]
    inputs, outputs = ([helper.make_tensor_value_info(name, kind, shape)] for name in names)
    if finite:
        nodes.append(helper.make_node("ReduceSum", ["b", "axes"], ["finite"], keepdims=0))
        outputs.append(helper.make_tensor_value_info("finite", FLOAT, shape[:1]))
        constants.append(helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]))
    graph = helper.make_graph(nodes, "test", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"size_multiple": "8"} if metadata is None else metadata)
    onnx.save(model, path)
    return path
