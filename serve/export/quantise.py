"""Towers in int8: which weights, how, and what became of the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pairstream.errors import require
from pretrain.towers import quiet

PRODUCTS = ("MatMul", "Gemm")
FIRST = {"image": 0, "text": 3}  # of a tower's products, those that stay float32 beside the last


def quantize(folder: Path, into: Path | None = None, *, reduce_range: bool = False) -> dict[str, Any]:
    """Write dynamically quantised graphs: int8 weights, activations measured as they come.

    Per channel and signed: unsigned weights (onnxruntime's default) miss the fast kernels. A tower's last product,
    which makes the row, stays float32: it is a hundredth of the weights and was the largest single error. So do the
    text tower's first three (attention and the way into the MLP of its first block), whose input has the start
    token's outliers: of the quickstart's pictures 1.7 % have another first text with them in float32, 3.7 % without.
    In the text tower the table of embeddings is quantised as well, each of its rows by its own scale: it is most of a
    small tower's file, and with one scale for all of it twice as many first texts were others.

    Args:
        folder: Holds `image.onnx` and `text.onnx`, float32.
        into: Another folder for the int8 graphs of the same names; None replaces them.
        reduce_range: Seven bits: for CPUs without VNNI (AVX2), whose kernels may saturate on eight.

    Returns:
        For each tower, how many products are int8 and how many float32, how many convolutions stay float32, and how
        many tables are int8.
    """
    require("onnxruntime", "export", "int8 towers")
    onnx = require("onnx", "export", "int8 towers")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    report = {}
    for name in ("image", "text"):
        source, prepared = folder / f"{name}.onnx", folder / f"{name}.prepared.onnx"
        target = (into or folder) / f"{name}.int8.onnx"
        with quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_dynamic(
                str(prepared),
                str(target),
                op_types_to_quantize=list(PRODUCTS),
                per_channel=True,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=float_products(onnx.load(str(prepared)).graph, FIRST[name]),
            )
        prepared.unlink()
        model = onnx.load(str(target))
        tables = shrink_tables(model.graph) if name == "text" else 0
        onnx.save(model, str(target))
        counts: dict[str, int] = {}
        for node in model.graph.node:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        report[name] = {
            "int8_products": counts.get("MatMulInteger", 0),
            "float_products": sum(counts.get(kind, 0) for kind in PRODUCTS),
            "float_convolutions": counts.get("Conv", 0),
            "int8_tables": tables,
        }
        target.replace((into or folder) / f"{name}.onnx")
    return report


def float_products(graph: Any, first: int) -> list[str]:
    """The names of the first so many products with a weight, and of the last; none is both.

    Each has two, since onnxruntime takes a Gemm apart under another name.
    """
    weights = {each.name for each in graph.initializer}
    found = [
        node.name
        for node in graph.node
        if node.op_type in PRODUCTS and any(each in weights for each in node.input)
    ]
    return [name for kept in (*found[:-1][:first], *found[-1:]) for name in (kept, f"{kept}_MatMul")]


def shrink_tables(graph: Any) -> int:
    """Quantise tables that rows are looked up in, row by row; returns how many there were."""
    onnx = require("onnx", "export", "int8 towers")
    weights = {each.name: each for each in graph.initializer}
    nodes, shrunk = [], set()
    for node in graph.node:
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        along = next((each.i for each in node.attribute if each.name == "axis"), 0)
        if table is None or along or len(table.dims) != 2 or table.data_type != onnx.TensorProto.FLOAT:
            nodes.append(node)
            continue
        if table.name not in shrunk:
            rows = onnx.numpy_helper.to_array(table)
            scale = np.abs(rows).max(axis=1, keepdims=True) / 127
            scale[scale == 0] = 1
            whole = np.rint(rows / scale).astype(np.int8)
            graph.initializer.extend(
                onnx.numpy_helper.from_array(value, f"{table.name}.{part}")
                for part, value in (("int8", whole), ("scale", scale.astype(np.float32)))
            )
            shrunk.add(table.name)
        out, make = node.output[0], onnx.helper.make_node
        for part in ("int8", "scale"):
            nodes.append(make("Gather", [f"{table.name}.{part}", node.input[1]], [f"{out}.{part}"], axis=0))
        nodes.append(make("Cast", [f"{out}.int8"], [f"{out}.float"], to=onnx.TensorProto.FLOAT))
        nodes.append(make("Mul", [f"{out}.float", f"{out}.scale"], [out], name=f"{node.name}.int8"))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {each for node in nodes for each in node.input}
    for table in [weights[name] for name in shrunk if name not in used]:
        graph.initializer.remove(table)
    return len(shrunk)
