# SPDX-License-Identifier: Apache-2.0
"""Which divisions of an ONNX graph are of real numbers.

onnxruntime divides integers with the processor's own instruction, and the smallest integer by -1 ends the process. The
types of ONNX tell integers from real numbers without running anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

Fields = Callable[[memoryview], Iterator[tuple[int, "memoryview | int"]]]

_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER = 1, 5  # of GraphProto
_INPUT, _OUTPUT, _OP_TYPE, _ATTRIBUTE = 1, 2, 4, 5  # of NodeProto
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR = 1, 3, 5
_ATTRIBUTE_VALUES = {*range(2, 12), 14, 15, 22, 23}  # the fields that a value can be in; an attribute has one of them
_DATA_TYPE, _TENSOR_NAME = 2, 8  # of TensorProto
_REALS = {1, 10, 11, 16}  # data types: float, float16, double, bfloat16
_DIVISIONS = (b"Div", b"Mod")
# Operators that end the process in onnxruntime 1.32 if an input has no name.
NAMED_INPUTS = frozenset(b"Concat Einsum LayerNormalization Max Mean Min SequenceConstruct Sum".split())
# Operators whose first output may have another type than their first input.
_OTHER_TYPE = frozenset(
    b"And ArgMax ArgMin BitCast Cast CastLike Constant ConstantOfShape ConvInteger DequantizeLinear "
    b"DynamicQuantizeLinear Equal EyeLike Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual MatMulInteger NonZero "
    b"OneHot Or QLinearConv QLinearMatMul QuantizeLinear SequenceLength Shape Size TfIdfVectorizer Where Xor".split()
)
_ALWAYS_REAL = frozenset(
    b"AveragePool BatchNormalization Conv ConvTranspose Cos DequantizeLinear Exp Gelu GlobalAveragePool "
    b"GroupNormalization HardSigmoid HardSwish InstanceNormalization LayerNormalization Log LogSoftmax Mish "
    b"RMSNormalization Reciprocal Sigmoid Sin Softmax Softplus Sqrt Swish Tan Tanh".split()
)
_SAME_TYPE = frozenset(b"Add Concat Div Einsum Gemm MatMul Max Mean Min Mod Mul Sub Sum".split())  # of all inputs


def check_divisions(model: memoryview, fields: Fields) -> None:
    """Refuse a division of what may be integers, and inputs without a name that end the process.

    Args:
        model: a ModelProto.
        fields: number and content of each field of a message.

    Raises:
        ValueError: naming the first output.
    """
    real: set[bytes] = set()
    graphs = [content for number, content in fields(model) if number == _GRAPH and isinstance(content, memoryview)]
    nodes = []
    for graph in graphs:
        for number, content in fields(graph):
            if number == _INITIALIZER and isinstance(content, memoryview):
                name, kind = _tensor(content, fields)
                real |= {name} if name and kind in _REALS else set()
            elif number == _NODE and isinstance(content, memoryview):
                nodes.append(content)
    for node in nodes:  # in an order in which each comes after what it reads
        operator, inputs, outputs, kind = _node(node, fields)
        if operator in NAMED_INPUTS and b"" in inputs:
            raise ValueError(f"it has {operator.decode()} of an input without a name: {b''.join(outputs[:1])[:50]!r}")
        if operator in (b"Cast", b"Constant", b"ConstantOfShape", b"EyeLike"):
            known = kind in _REALS
        elif operator == b"Where":
            known = bool(real.intersection(inputs[1:]))
        else:
            taken = inputs if operator in _SAME_TYPE else inputs[:1]
            known = operator in _ALWAYS_REAL or (operator not in _OTHER_TYPE and bool(real.intersection(taken)))
        if operator in _DIVISIONS and not known:
            raise ValueError(f"it divides what may be integers: {b''.join(outputs[:1])[:50]!r}")
        if known:
            real.update(name for name in (outputs if operator == b"Split" else outputs[:1]) if name)


def _tensor(message: memoryview, fields: Fields) -> tuple[bytes, int]:
    """Name and data type of a tensor."""
    name, kind = b"", 0
    for number, content in fields(message):
        if number == _TENSOR_NAME and isinstance(content, memoryview):
            name = bytes(content)
        elif number == _DATA_TYPE and isinstance(content, int):
            kind = content
    return name, kind


def _node(message: memoryview, fields: Fields) -> tuple[bytes, list[bytes], list[bytes], int]:
    """Operator, inputs and outputs of a node, and the data type that an attribute of it names (`to`, `value`, ...).

    Raises:
        ValueError: if more than one attribute could name it. Which of them counts, onnxruntime alone decides.
    """
    operator, kind = b"", 0
    names: list[bytes] = []
    inputs: list[bytes] = []
    outputs: list[bytes] = []
    for number, content in fields(message):
        if not isinstance(content, memoryview):
            continue
        if number == _OP_TYPE:
            operator = bytes(content)
        elif number in (_INPUT, _OUTPUT):
            (inputs if number == _INPUT else outputs).append(bytes(content))
        elif number == _ATTRIBUTE:
            name, named = _attribute(content, fields)
            names.append(name)
            kind = named or kind
    naming = sum(name in (b"to", b"dtype") or name.startswith(b"value") for name in names)
    if len(set(names)) < len(names) or naming > 1 or (operator == b"Constant" and len(names) != 1):
        raise ValueError(f"a node of it has the attributes {b', '.join(names)[:100]!r}")
    return operator, inputs, outputs, kind or (1 if operator == b"ConstantOfShape" else 0)


def _attribute(message: memoryview, fields: Fields) -> tuple[bytes, int]:
    """Name of an attribute, and the data type that it names; 0 where it names none."""
    name, number_of, tensor = b"", 0, 0
    values = set()
    for number, content in fields(message):
        values |= {number} & _ATTRIBUTE_VALUES
        if number == _ATTRIBUTE_NAME and isinstance(content, memoryview):
            name = bytes(content)
        elif number == _ATTRIBUTE_INT and isinstance(content, int):
            number_of = content
        elif number == _ATTRIBUTE_TENSOR and isinstance(content, memoryview):
            tensor = _tensor(content, fields)[1]
    if len(values) > 1:
        raise ValueError(f"the attribute {name[:50]!r} of a node has several values")
    if name in (b"to", b"dtype"):
        return name, number_of
    return name, {b"value": tensor, b"value_float": 1, b"value_floats": 1}.get(name, 0)
