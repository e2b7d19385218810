"""Hostile changes that know a format: a flipped byte of an archive is refused at its checksum, and tests no more."""

import io
import json
import random
import zipfile
from typing import Any

NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        255,
        2**31,
        2**53 + 1,
        -(2**63),
        2**64,
        10**40,
        0.5,
        -0.0,
        1e308,
        float("nan"),
    ),
    *(float("inf"), "", "0", "1", "a", "\ud800", "é\u2028", "../../x", "/etc/passwd", "nan", "1e999", "x" * 300),
    *([], {}, [[]], [None], [1, 2, 3, 4], {"a": 1}, [[0, 0, 1, 1, 1, 0]], {"size": [1, 1], "counts": "x"}),
)


def nested(value: Any, dice: random.Random, changes: int = 2) -> Any:
    """A copy of what JSON can hold, with some values replaced, removed, doubled or given other names."""
    value = json.loads(json.dumps(value))
    for _ in range(dice.randint(1, changes)):
        holders: list[Any] = []
        waiting = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, dict | list) and one:
                holders.append(one)
                waiting += one.values() if isinstance(one, dict) else one
        if not holders:
            return dice.choice(NASTY)
        holder = dice.choice(holders)
        place = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        what = dice.randrange(8)
        if what < 5:
            holder[place] = dice.choice(NASTY)
        elif what == 5:
            del holder[place]
        elif isinstance(holder, list):
            holder.append(holder[place])
        else:
            holder[str(dice.choice(NASTY))] = holder[place]
    return dice.choice(NASTY) if dice.random() < 0.02 else value


def of_json(data: bytes, dice: random.Random) -> bytes:
    """JSON with other values; now and then nested without end."""
    if dice.random() < 0.01:
        return b'{"images":' * 3 + b"[" * 100_000
    return json.dumps(nested(json.loads(data), dice)).encode()


def of_lines(data: bytes, dice: random.Random) -> bytes:
    """Text with lines, cells or numbers replaced."""
    lines = data.split(b"\n")
    for _ in range(dice.randint(1, 3)):
        place = dice.randrange(len(lines))
        cells = lines[place].split(b",")
        cells[dice.randrange(len(cells))] = str(dice.choice(NASTY)).encode("utf-8", "surrogatepass")
        lines[place] = dice.choice((b",".join(cells), b"", lines[place] * 2, lines[place] + b'"', b"\0", b"\xff\xfe"))
    return b"\n".join(lines)


def of_xml(data: bytes, dice: random.Random) -> bytes:
    """XML with the text of elements replaced, elements gone or twice, entities declared."""
    parts = data.replace(b"<", b"\n<").replace(b">", b">\n").split(b"\n")
    for _ in range(dice.randint(1, 3)):
        place = dice.randrange(len(parts))
        text = str(dice.choice(NASTY)).encode("utf-8", "surrogatepass")
        parts[place] = dice.choice(
            (text, b"", parts[place] * 2, b"&a;", b'<!DOCTYPE a [<!ENTITY a SYSTEM "/etc/passwd">]>')
        )
    return b"".join(parts)


def of_safetensors(data: bytes, dice: random.Random) -> bytes:
    """Another header (or length of it) before the same numbers; what the metadata hold as JSON is changed as JSON."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    said = header.get("__metadata__", {})
    if said and dice.random() < 0.6:
        name = dice.choice(list(said))
        said[name] = json.dumps(nested(json.loads(said[name]), dice))
    else:
        header = nested(header, dice)
    text = json.dumps(header).encode()
    stated = len(text) if dice.random() < 0.9 else dice.choice((0, 2**63 - 1, 2**40, len(text) - 1))
    return stated.to_bytes(8, "little") + text + data[8 + length :]


def of_zip(data: bytes, dice: random.Random) -> bytes:
    """An archive one of whose members has other bytes, under a sound checksum, or another name."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = dice.choice([*names, *(name for name in names if name.endswith(".pkl")) * 3])
        for name in names:
            held = bytearray(old.read(name))
            if name == chosen:
                held = flipped(held, dice)
                name = name if dice.random() < 0.9 else dice.choice((f"../{name}", f"/{name}", name.upper()))
            new.writestr(name, bytes(held))
    return made.getvalue()


def flipped(held: bytearray, dice: random.Random) -> bytearray:
    """Bytes changed, cut out, put in or repeated."""
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(held) + 1)
        what = dice.randrange(4)
        if what == 0 and at < len(held):
            held[at] = dice.randrange(256)
        elif what == 1:
            del held[at : at + dice.randint(1, 8)]
        elif what == 2:
            held[at:at] = dice.randbytes(dice.randint(1, 8))
        else:
            held[at:at] = held[max(0, at - dice.randint(1, 40)) : at]
    return held


def of_hdf5(data: bytes, dice: random.Random) -> bytes:
    """An HDF5 file whose tables or attributes have other kinds, shapes or numbers, are links, or gone."""
    import h5py
    import numpy as np

    image = io.BytesIO(data)
    with h5py.File(image, "r+") as file:
        if file.attrs and dice.random() < 0.4:
            name = dice.choice(list(file.attrs))
            del file.attrs[name]
            value = dice.choice([*NASTY[:24], np.arange(3), np.float32(1), b"\xff"])
            if value is not None and not (isinstance(value, int) and abs(value) > 2**63):
                file.attrs[name] = value if value != "\ud800" else "?"
            return _closed(file, image)
        name = dice.choice(list(file))
        held = np.asarray(file[name])
        what = dice.randrange(9)
        if what == 0 and held.size and held.dtype.kind in "iufb":
            flat = held.reshape(-1)
            limits = (0, 1, -1, 127) if held.dtype.kind == "b" else (0, 1, -1, 2**31 - 1, -(2**31), 2**20)
            with np.errstate(all="ignore"):
                flat[dice.randrange(flat.size)] = np.array(dice.choice(limits)).astype(held.dtype)
            file[name][...] = held
            return _closed(file, image)
        del file[name]
        if what == 1:
            file[name] = h5py.SoftLink(f"/{name}")
        elif what == 2:
            file[name] = h5py.ExternalLink("/etc/passwd", "/x")
        elif what == 3:
            file.create_group(name)
        elif what == 4:
            file.create_dataset(name, shape=(*held.shape[:-1], 2**40), dtype="f4", chunks=(*held.shape[:-1], 1))
        elif what == 5:
            file[name] = h5py.Empty("f4")
        elif what == 6:
            file[name] = held[: held.shape[0] // 2] if held.ndim else 0
        elif what == 7:
            file[name] = np.zeros(held.shape, dice.choice(["f8", ">f4", "i1", "S3", "c8", "u8"]))
        return _closed(file, image)


def _closed(file: Any, image: io.BytesIO) -> bytes:
    file.flush()
    return image.getvalue()


def of_bytes(data: bytes, dice: random.Random) -> bytes:
    """Any bytes changed."""
    return bytes(flipped(bytearray(data), dice))
