# SPDX-License-Identifier: Apache-2.0
"""What an ONNX file may hold before onnxruntime sees it, read with the standard library alone.

An exported graph has nodes of plain ONNX on numbers, and runs each of them once. Loops, functions, texts and sparse
weights could make a small file run for ever or fill the memory; external weights and other operators could name any
file of the machine. Files that hold them are refused.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from aced_sdk.files import open_regular, printable
from export.runtime.errors import FolderError, folder_errors
from export.runtime.graph_types import check_divisions

_MAX_NODES = 20_000
_MAX_FIELDS = 500_000  # a second of reading

# Fields of onnx.proto that hold messages which are looked into, by message and field number.
MESSAGES = {
    "ModelProto": {7: "GraphProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {5: "TensorProto", 10: "TensorProto"},
    "TensorProto": {13: "StringStringEntryProto"},
    "StringStringEntryProto": {},
}
# Fields that a file must not have.
REFUSED = {
    "ModelProto": {20: "training_info", 25: "functions"},
    "GraphProto": {15: "sparse_initializer"},
    "AttributeProto": {6: "g", 11: "graphs", 22: "sparse_tensor", 23: "sparse_tensors"},
}
_OP_TYPE, _DOMAIN, _KEY, _VALUE = 4, 7, 1, 2
_DOMAINS = (b"", b"ai.onnx")
_TEXTS = (b"String", b"Regex")  # operators on texts, whose memory nothing bounds
# Operators that read files, take time without bound for small tensors, or give random numbers; no export has them.
_REFUSED_OPERATORS = frozenset(
    b"EPContext NonMaxSuppression RNN GRU LSTM DFT STFT RoiAlign RandomNormal RandomNormalLike RandomUniform "
    b"RandomUniformLike Multinomial Bernoulli".split()
)


def check_graph_file(path: Path, data: str | None) -> None:
    """Refuse an ONNX file that is more than a chain of plain nodes.

    Args:
        path: the file.
        data: the file of the external weights, which is beside it; None for a graph without any.

    Raises:
        FolderError: if it is broken, has subgraphs, functions, other operators, divisions of integers, sparse or
            external weights, or too many nodes.
    """
    with folder_errors(), open_regular(path) as stream:
        try:
            model = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
            _check(model, data and Path(data).name)
            check_divisions(model, _fields)
        except (ValueError, IndexError) as error:
            raise FolderError(
                f"{printable(path)} is no graph that an export writes: {printable(error)}",
                remedy="export the student again",
            ) from None


def _check(model: memoryview, data: str | None) -> None:
    nodes = fields = 0
    left = [("ModelProto", model)]
    while left:
        kind, message = left.pop()
        nodes += kind == "NodeProto"
        entry: dict[int, bytes] = {}
        for number, content in _fields(message):
            fields += 1
            if nodes > _MAX_NODES or fields > _MAX_FIELDS:
                raise ValueError("it has too many nodes or fields")
            if name := REFUSED.get(kind, {}).get(number):
                raise ValueError(f"it has {name}")
            if isinstance(content, int):
                continue
            if inner := MESSAGES[kind].get(number):
                left.append((inner, content))
            elif kind == "StringStringEntryProto":
                entry[number] = bytes(content)
            elif kind == "NodeProto" and number == _OP_TYPE:
                if bytes(content).startswith(_TEXTS) or bytes(content) in _REFUSED_OPERATORS:
                    raise ValueError(f"it has the operator {bytes(content[:50])!r}")
            elif kind == "NodeProto" and number == _DOMAIN and bytes(content) not in _DOMAINS:
                raise ValueError(f"it has operators of the domain {bytes(content[:50])!r}")
        if entry.get(_KEY) == b"location" and (data is None or entry.get(_VALUE) != data.encode()):
            raise ValueError(f"it has weights in {entry.get(_VALUE, b'')[:200]!r}")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Number and content of each field of a protobuf message; a number of fixed length is given as 0."""
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        kind = tag & 7
        content: memoryview | int = 0
        if kind == 0:
            content, at = _number(message, at)
        elif kind == 2:
            size, at = _number(message, at)
            content = message[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}.get(kind, len(message))  # groups, which onnx.proto does not use, end beyond the message
        if at > len(message) or not 8 <= tag < 2**32:
            raise ValueError("a field is broken")
        yield tag >> 3, content


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """A protobuf varint and the place after it."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is broken")
