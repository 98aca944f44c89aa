"""Faults of arrays and weights: .npy, .npz, safetensors, pickles, torch files."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.faults import (
    HUGE,
    MARKER,
    NAMES,
    Call,
    Fault,
    array,
    bombs,
    bytewise,
    flip,
    npy,
    put,
    zipped,
)


def of_npy() -> list[Fault]:
    def header(shape: Any, descr: Any = "<f4", order: Any = False) -> bytes:
        return npy({"descr": descr, "fortran_order": order, "shape": shape})

    bomb = np.empty((1, 1), object)
    bomb[0, 0] = Call(os.mkdir, str(MARKER))
    return [
        Fault(kind, name, put(content))
        for kind, name, content in (
            ("huge", "shape", header((HUGE, 4))),
            ("huge", "shape-product", header((2**40, 2**40))),
            ("huge", "one-gib", header((2**28, 1))),
            ("huge", "negative", header((-1, 4))),
            ("huge", "no-columns", header((HUGE, 0))),
            ("huge", "header", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{"),
            ("huge", "nested-header", npy("(" * 5000)),
            ("huge", "digits", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}"
                                   % ("9" * 5000))),
            ("wrong shape", "scalar", array(np.float32(1))),
            ("wrong shape", "vector", array(np.arange(4.0))),
            ("wrong shape", "cube", array(np.zeros((2, 3, 4)))),
            ("wrong shape", "no-rows", array(np.zeros((0, 4)))),
            ("wrong shape", "fewer-rows", array(np.zeros((2, 4), np.float32))),
            ("wrong dtype", "text", array(np.array([["a", "b"]]))),
            ("wrong dtype", "complex", array(np.ones((2, 4), complex))),
            ("wrong dtype", "bool", array(np.ones((2, 4), bool))),
            ("wrong dtype", "date", array(np.zeros((2, 4), "M8[s]"))),
            ("wrong dtype", "record", array(np.zeros((2, 4), [("a", "f4"), ("b", "O")]))),
            ("wrong dtype", "void", header((2, 4), "|V4")),
            ("wrong dtype", "big-endian", header((2, 4), ">f4")),
            ("wrong dtype", "unknown", header((2, 4), "<q9")),
            ("wrong dtype", "code", npy(f"__import__('os').mkdir('{MARKER}')")),
            ("wrong value", "nan", array(np.full((2, 4), np.nan))),
            ("hostile pickle", "object", array(bomb)),
            ("hostile pickle", "after-header", header((1, 1), "|O") + bombs()["protocol-2"]),
            ("missing key", "shape", npy({"descr": "<f4", "fortran_order": False})),
            ("extra key", "unknown", npy({"descr": "<f4", "fortran_order": False, "shape": (2, 4),
                                          "more": 1})),
        )
    ]  # fmt: skip


def of_npz(path: Path) -> list[Fault]:
    with np.load(path) as stored:
        arrays = dict(stored)

    def written(changed: dict[str, np.ndarray], **raw: bytes) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, value in changed.items():
                archive.writestr(f"{name}.npy", array(np.asarray(value)))
            for name, content in raw.items():
                archive.writestr(f"{name}.npy", content)
        return made.getvalue()

    bomb = np.empty(1, object)
    bomb[0] = Call(os.mkdir, str(MARKER))
    huge = npy({"descr": "<f8", "fortran_order": False, "shape": (HUGE,)})
    big = npy({"descr": "<f8", "fortran_order": False, "shape": (2**29,)})
    found = [
        Fault("extra key", "traversal", put(written(arrays | {"../../x": np.arange(2)}))),
        Fault("structure", "empty", put(written({}))),
        Fault("structure", "not-arrays", put(zipped(a=b"text"))),
        Fault("structure", "twice", bytewise(lambda b: b + b)),
    ]
    for name, value in arrays.items():
        rest = {key: other for key, other in arrays.items() if key != name}
        odd: dict[str, tuple[str, bytes]] = {
            "gone": ("missing key", written(rest)),
            "pickle": ("hostile pickle", written(rest | {name: bomb})),
            "huge": ("huge", written(rest, **{name: huge})),
            "4-gib": ("huge", written(rest, **{name: big})),
            "text": ("wrong dtype", written(rest | {name: np.array(["a", "b"])})),
            "complex": ("wrong dtype", written(rest | {name: np.ones(np.shape(value), complex)})),
            "scalar": ("wrong shape", written(rest | {name: np.array(3)})),
            "short": ("wrong shape", written(rest | {name: np.ravel(value)[:-1]})),
            "none": ("wrong shape", written(rest | {name: np.ravel(value)[:0]})),
        }
        if np.asarray(value).dtype.kind in "iuf":
            odd["negative"] = ("wrong value", written(rest | {name: np.full_like(value, -1)}))
            odd["wild"] = ("wrong value", written(rest | {name: np.full_like(value, 2**30)}))
        found += [Fault(kind, f"any {name} {told}", put(content))
                  for told, (kind, content) in odd.items()]  # fmt: skip
    return found


def of_safetensors(path: Path) -> list[Fault]:
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    head, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]

    def written(header: Any, content: bytes = data) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content

    name = next(key for key in head if key != "__metadata__")
    entry = head[name]
    odd = {
        "shape-huge": {"shape": [HUGE, 4]}, "shape-negative": {"shape": [-1]},
        "shape-zero": {"shape": [0, HUGE]}, "shape-text": {"shape": ["4"]},
        "shape-other": {"shape": [1, *entry["shape"]]}, "dtype-unknown": {"dtype": "F3"},
        "dtype-bf16": {"dtype": "BF16"}, "dtype-int": {"dtype": "I32"},
        "dtype-bool": {"dtype": "BOOL"},
        "offsets-beyond": {"data_offsets": [0, HUGE]},
        "offsets-backward": {"data_offsets": [64, 0]},
        "offsets-float": {"data_offsets": [0.5, 1e999]},
    }  # fmt: skip
    found = [
        Fault("huge", "header-length", put(struct.pack("<Q", HUGE) + whole[8:])),
        Fault("huge", "header-2-gib", put(struct.pack("<Q", 2**31) + whole[8:])),
        Fault("huge", "header-zero", put(struct.pack("<Q", 0) + whole[8:])),
        Fault("structure", "deep-header", put(written(b"[" * 100_000))),
        Fault("structure", "list-header", put(written([]))),
        Fault("structure", "no-tensors", put(written({}, b""))),
        Fault("structure", "bytes-after", put(whole + bytes(64))),
        Fault("extra key", "tensor", put(written(head | {
            "zz": {"dtype": "U8", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
        }, data + bytes(4)))),
        Fault("extra key", "twice", put(written(
            b"{" + json.dumps({name: entry}).encode()[1:-1] + b", " + json.dumps(head).encode()[1:]
        ))),
        Fault("extra key", "metadata", put(written({"__metadata__": {"a": "b" * 10_000}} | head))),
        Fault("wrong value", "nan", put(written(head, b"\xff" * len(data)))),
    ]  # fmt: skip
    for key in head:
        if key != "__metadata__":
            renamed = {NAMES["newline"] if k == key else k: v for k, v in head.items()}
            found.append(Fault("missing key", f"any {key}", put(written(renamed))))
    for told, change in odd.items():
        kind = "wrong dtype" if "dtype" in told else "huge" if "huge" in told else "wrong shape"
        found.append(Fault(kind, told, put(written(head | {name: entry | change}))))
    for told, text in NAMES.items():
        renamed = {text if k == name else k: v for k, v in head.items()}
        found.append(Fault("names", told, put(written(renamed))))
    return found


def of_pickle() -> list[Fault]:
    found = [Fault("hostile pickle", name, put(bomb)) for name, bomb in bombs().items()]
    frame = b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"N."
    text = b"\x80\x04\x8d" + struct.pack("<Q", HUGE) + b"x"
    gib = b"\x80\x02T" + struct.pack("<I", 2**30) + b"x"
    values = {
        "none": None, "list": [1, 2], "numbers": {1: 2}, "names": {NAMES["newline"]: NAMES["html"]},
        "deep": {"a": {"b": {"c": {}}}}, "huge": {"<pad>": HUGE, "a": 10**400},
    }  # fmt: skip
    itself: list[Any] = []
    itself.append(itself)
    return [
        *found,
        Fault("huge", "frame", put(frame)),
        Fault("huge", "text", put(text)),
        Fault("huge", "string", put(gib)),
        Fault("huge", "memo", put(b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".")),
        Fault("huge", "deep", put(b"\x80\x02" + b"(" * 100_000 + b"N" + b"t" * 100_000 + b".")),
        Fault("structure", "of-itself", put(pickle.dumps(itself))),
        *(Fault("wrong value", name, put(pickle.dumps(value))) for name, value in values.items()),
    ]


def of_torch(path: Path) -> list[Fault]:
    import torch

    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).split("/")[0]
    data = f"{root}/data.pkl"

    def written(changed: dict[str, bytes]) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
            for name, content in changed.items():
                archive.writestr(name, content)
        return made.getvalue()

    def saved(value: Any, **options: Any) -> bytes:
        made = io.BytesIO()
        torch.save(value, made, **options)
        return made.getvalue()

    found = [
        Fault("hostile pickle", name, put(written(members | {data: bomb})))
        for name, bomb in bombs().items()
    ]
    found += [
        Fault("hostile pickle", f"legacy-{name}", put(bomb * 3)) for name, bomb in bombs().items()
    ]
    legacy = {"_use_new_zipfile_serialization": False}

    def without(name: str) -> dict[str, bytes]:
        return {key: content for key, content in members.items() if key != name}

    storages = [name for name in members if name.startswith(f"{root}/data/")]
    tensor = torch.zeros(2, 2)
    other = {
        "list": [tensor], "tensor": tensor, "numbers": {"a": 1, "b": 2.5},
        "nested": {"a": {"b": tensor}},
        "empty": {}, "integer-names": {1: tensor}, "newline": {NAMES["newline"]: tensor},
        "long": {NAMES["long"]: tensor}, "sparse": {"a": tensor.to_sparse()},
        "quantized": {"a": torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8)},
        "complex": {"a": tensor.to(torch.complex64)},
    }  # fmt: skip
    found += [Fault("structure", name, put(saved(value))) for name, value in other.items()]
    huge = members[data].replace(b"M\x10\x00", b"J\x00\x00\x00\x40")
    found += [
        Fault("structure", "legacy", put(saved({"a": tensor}, **legacy))),
        Fault("missing key", "data.pkl", put(written(without(data)))),
        Fault("missing key", "storage", put(written(without(storages[0])))),
        Fault("wrong shape", "short-storage", put(written(members | {storages[0]: b"\0"}))),
        Fault("wrong shape", "long-storage", put(written(members | {storages[0]: bytes(10_000)}))),
        Fault("wrong value", "nan", put(written(members | {s: b"\xff" * len(members[s])
                                                            for s in storages}))),
        Fault("huge", "sizes", put(written(members | {data: huge}))),
        Fault("extra key", "traversal", put(written(members | {"../../x": b"x"}))),
        Fault("extra key", "program", put(written(members | {f"{root}/constants.pkl": b"N."}))),
    ]  # fmt: skip
    for i in range(12):
        random_ = random.Random(i)
        flipped = flip(random_.random(), random_.randrange(8))(members[data])
        found.append(Fault("flipped", f"pickle-{i}", put(written(members | {data: flipped}))))
    return found
