"""Files that lie: seeded mutations of good safetensors, GGUF and ONNX files: lengths, offsets, dtypes, shapes, and plain noise."""

import json
import random
import struct

import onnx

HUGE = (0, 1, -1, 7, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "F8_E8M0", "C64", "nonsense", "", None, 3)
JUNK = (None, True, "x", -1, 0, 1.5, 2**63, 2**70, [], {}, [[]], "4")


def noise(data: bytes, draw: random.Random, *, head: int) -> bytes:
    """Flip bits, set bytes, cut, repeat or insert, mostly where a header is."""
    found = bytearray(data)
    kind = draw.randrange(5)
    if kind == 0:
        return bytes(found[: draw.randrange(len(found))])
    if kind == 1:
        at = draw.randrange(min(head, len(found)))
        return bytes(found[:at] + draw.randbytes(draw.randrange(1, 9)) + found[at:])
    if kind == 2:
        return bytes(found + draw.randbytes(draw.randrange(1, 64)))
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(min(head, len(found)))
        found[at] = found[at] ^ (1 << draw.randrange(8)) if kind == 3 else draw.choice((0, 1, 127, 128, 255))
    return bytes(found)


def number_at(data: bytes, at: int, form: str, draw: random.Random) -> bytes:
    """Overwrite one integer by a value that hurts."""
    width = struct.calcsize(form)
    value = draw.choice(HUGE) & (1 << 8 * width) - 1
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def safetensors(data: bytes, draw: random.Random) -> bytes:
    """Change a safetensors file: its header's length, one entry of the header, what `stepwell.save` says in it, or anything."""
    kind = draw.randrange(10)
    if kind == 0:
        return noise(data, draw, head=8 + int.from_bytes(data[:8], "little"))
    if kind == 1:
        return number_at(data, 0, "<Q", draw)
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    if kind in (2, 3) and "stepwell" in header.get("__metadata__", {}):
        header["__metadata__"]["stepwell"] = _description(header["__metadata__"]["stepwell"], draw)
    else:
        _entry(header, draw.choice(names), names, draw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _entry(header: dict, name: str, names: list, draw: random.Random) -> None:
    """Change one tensor's entry."""
    entry = header[name]
    kind = draw.randrange(9)
    if kind == 0:
        entry["dtype"] = draw.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = [draw.choice((*HUGE, *entry["shape"])) for _ in range(draw.randrange(5))]
    elif kind == 2:
        entry["data_offsets"] = [draw.choice((*HUGE, *entry["data_offsets"])) for _ in range(draw.choice((1, 2, 2, 2, 3)))]
    elif kind == 3:
        entry["data_offsets"] = list(header[draw.choice(names)]["data_offsets"])  # over another's bytes
    elif kind == 4:
        entry[draw.choice(("dtype", "shape", "data_offsets"))] = draw.choice(JUNK)
    elif kind == 5:
        del entry[draw.choice(list(entry))]
    elif kind == 6:
        header[draw.choice(("", "x" * 5000, "\0", "é", "__metadata__"))] = dict(entry)
    elif kind == 7:
        del header[name]
    else:
        first = entry["data_offsets"]
        entry["data_offsets"], entry["shape"] = [first[1], first[0]], list(reversed(entry["shape"]))


def _description(text: str, draw: random.Random) -> str:
    """Change what `stepwell.save` says of its weights."""
    described = json.loads(text)
    kind = draw.randrange(6)
    if kind == 0:
        return draw.choice(("", "{", "[]", "null", "[" * 3000, text[: draw.randrange(len(text))]))
    if kind == 1:
        described[draw.choice(("version", "single", "weights"))] = draw.choice(JUNK)
        return json.dumps(described)
    entry = described["weights"][draw.choice(list(described["weights"]))]
    key = draw.choice(list(entry))
    if kind == 2:
        del entry[key]
    elif kind == 3:
        entry["shape"] = [draw.choice((*HUGE, 2**20, *entry["shape"])) for _ in range(draw.randrange(4))]
    elif kind == 4:
        entry["format"] = draw.choice(("int2", "int8", "fp4_e2m1", "ternary", "int4/affine", "nonsense"))
    else:
        entry[key] = draw.choice((*JUNK, "channel", 16, "e4m3", "fp16", "mse", "full"))
    return json.dumps(described)


def gguf(data: bytes, draw: random.Random) -> bytes:
    """Change a GGUF file: one of its counts, an integer anywhere in its header, or anything."""
    head = min(len(data), 2600)
    kind = draw.randrange(4)
    if kind == 0:
        return noise(data, draw, head=head)
    if kind == 1:
        return number_at(data, draw.choice((4, 8, 16)), draw.choice(("<I", "<Q")), draw)
    return number_at(data, draw.randrange(24, head - 8), draw.choice(("<I", "<I", "<Q")), draw)


def onnx_file(data: bytes, draw: random.Random) -> bytes:
    """Change an ONNX file: a tensor's shape, type or data, a node's attributes or inputs, or any byte."""
    kind = draw.randrange(6)
    if kind == 0:
        return noise(data, draw, head=len(data))
    model = onnx.ModelProto.FromString(data)
    tensor, node = draw.choice(model.graph.initializer), draw.choice(model.graph.node)
    signed = [value for value in HUGE if -(2**63) <= value < 2**63]
    if kind == 1:
        del tensor.dims[:]
        tensor.dims.extend(draw.choice(signed) for _ in range(draw.randrange(5)))
    elif kind == 2:
        tensor.data_type = draw.choice((0, 1, 2, 3, 7, 8, 10, 16, 17, 21, 22, 23, 25, 26, 99, -1))
    elif kind == 3 and node.attribute:
        attribute = draw.choice(node.attribute)
        attribute.i = draw.choice(signed)
        if draw.random() < 0.3:
            node.attribute.remove(attribute)
    elif kind == 4:
        place = draw.randrange(len(node.input))
        node.input[place] = draw.choice(("", "nowhere", *(one.name for one in model.graph.initializer)))
    elif draw.random() < 0.5:
        tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)]
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entry = {"location": draw.choice(("../secret", "/etc/hostname", "gone", "one.onnx")), "offset": str(draw.choice(signed))}
        for key, value in (entry | {"length": str(draw.choice(signed))}).items():
            part = tensor.external_data.add()
            part.key, part.value = key, value
    return model.SerializeToString()
