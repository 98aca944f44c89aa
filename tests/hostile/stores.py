"""Faults of tables and stores: parquet, HDF5, zarr."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tests.hostile.faults import HUGE, NAMES, Fault, bombs, bytewise, flip, put
from tests.hostile.texts import of_json, with_value

OUTSIDE = "/etc/passwd"


def of_parquet(path: Path) -> list[Fault]:
    table = pd.read_parquet(path)

    def changed(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
        return lambda path: change(table.copy()).to_parquet(path, index=False)

    def about(path: Path) -> None:
        told = {b"pandas": b"[" * 1000}
        pq.write_table(pa.Table.from_pandas(table).replace_schema_metadata(told), path)

    def strange_index(path: Path) -> None:
        known = pa.Table.from_pandas(table)
        told = json.loads(known.schema.metadata[b"pandas"]) | {
            "index_columns": ["no such column", {"kind": "range", "start": 0, "stop": 1, "step": 1}]
        }  # fmt: skip
        text = {b"pandas": json.dumps(told).encode()}
        pq.write_table(known.replace_schema_metadata(text), path)

    found = [
        Fault("structure", "no-columns", changed(lambda t: t[[]])),
        Fault("structure", "no-rows", changed(lambda t: t.iloc[:0])),
        Fault("structure", "rows-twice", changed(lambda t: pd.concat([t, t]))),
        Fault("structure", "row-gone", changed(lambda t: t.iloc[1:])),
        Fault("structure", "reversed", changed(lambda t: t.iloc[::-1])),
        Fault("structure", "pandas-metadata", about),
        Fault("structure", "pandas-index", strange_index),
        Fault("extra key", "column", changed(lambda t: t.assign(**{"a\nb": 1.0}))),
    ]
    for name in table.columns:
        odd: dict[str, tuple[str, Callable[[pd.DataFrame], Any]]] = {
            "gone": ("missing key", lambda t: None),
            "null": ("wrong value", lambda t: pd.Series([None] * len(t), dtype=object)),
            "text": ("wrong dtype", lambda t: ["x"] * len(t)),
            "number": ("wrong dtype", lambda t: np.arange(len(t)) + 0.5),
            "negative": ("wrong value", lambda t: -1),
            "huge": ("huge", lambda t: HUGE),
            "nan": ("wrong value", lambda t: np.nan),
            "bytes": ("wrong dtype", lambda t: [b"\xff"] * len(t)),
            "lists": ("wrong dtype", lambda t: [[1, 2]] * len(t)),
            "dates": ("wrong dtype", lambda t: pd.Timestamp("2020-01-01")),
            "bools": ("wrong dtype", lambda t: True),
            **{f"name-{told}": ("names", lambda t, text=text: [text] * len(t))
               for told, text in NAMES.items()},
        }  # fmt: skip
        for told, (kind, value) in odd.items():
            change = (
                (lambda t, n=name: t.drop(columns=n)) if told == "gone"
                else (lambda t, n=name, v=value: t.assign(**{n: v(t)}))
            )  # fmt: skip
            label = f"any {name} {told}" if told != "gone" else f"{name} gone"
            found.append(Fault(kind, label, changed(change)))
    return found


def of_h5(path: Path) -> list[Fault]:
    def edited(change: Callable[[h5py.File], Any]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            with h5py.File(path, "r+") as file:
                change(file)

        return apply

    def replaced(name: str, make: Callable[[h5py.File], Any]) -> Callable[[h5py.File], None]:
        def change(file: h5py.File) -> None:
            told = dict(file[name].attrs)
            del file[name]
            made = make(file)
            if made is not None:
                file[name] = made
            if name in file and file.get(name, getlink=True).__class__ is h5py.HardLink:
                file[name].attrs.update(told)

        return change

    def vast(name: str, shape: tuple[int, ...], kind: Any = np.float32) -> Callable[..., None]:
        chunks = tuple(min(n, 64) for n in shape)
        return lambda file: file.create_dataset(name, shape, kind, chunks=chunks) and None

    with h5py.File(path) as file:
        nodes: dict[str, Any] = {}
        file.visititems(lambda name, node: nodes.update({name: isinstance(node, h5py.Dataset)}))
        shapes = {name: file[name].shape or () for name, array in nodes.items() if array}
        told = {name: list(file[name].attrs) for name in nodes}
    found = [Fault("missing key", f"any {name}", edited(lambda f, n=name: f.__delitem__(n)))
             for name in nodes]  # fmt: skip
    for name, attributes in told.items():
        for key in attributes:
            found.append(
                Fault(
                    "missing key",
                    f"any {name}@{key}",
                    edited(lambda f, n=name, k=key: f[n].attrs.__delitem__(k)),
                )
            )
            for odd, value in {
                "text": "x",
                "huge": HUGE,
                "pair": [HUGE, HUGE],
                "negative": [-1, -1],
                "list": ["a\nb", "c"],
                "pickle": np.void(bombs()["protocol-2"]),
            }.items():
                kind = "hostile pickle" if odd == "pickle" else "wrong value"
                kind = "huge" if "huge" in odd or odd == "pair" else kind
                found.append(
                    Fault(
                        kind,
                        f"any {name}@{key}={odd}",
                        edited(lambda f, n=name, k=key, v=value: f[n].attrs.__setitem__(k, v)),
                    )
                )
    for name, shape in shapes.items():
        ones = tuple(HUGE // 2**30 for _ in shape) or (2**33,)
        odd: dict[str, tuple[str, Callable[[h5py.File], Any]]] = {
            "huge": ("huge", replaced(name, vast(name, ones))),
            "4-gib": ("huge", replaced(name, vast(name, (2**30, *shape[1:])))),
            "text": ("wrong dtype", replaced(name, lambda f: "text")),
            "group": ("wrong dtype", replaced(name, lambda f, n=name: f.create_group(n) and None)),
            "negative": ("wrong value", replaced(name, lambda f, s=shape: np.full(s, -1))),
            "wild": ("wrong value", replaced(name, lambda f, s=shape: np.full(s, 2**31 - 1))),
            "nan": ("wrong value", replaced(name, lambda f, s=shape: np.full(s, np.nan))),
            "complex": ("wrong dtype", replaced(name, lambda f, s=shape: np.ones(s, complex))),
            "cube": ("wrong shape", replaced(name, lambda f: np.ones((2, 2, 2)))),
            "short": ("wrong shape", replaced(name, lambda f, s=shape: np.ones((*s, 2)[0] - 1))),
            "null": ("wrong type", replaced(name, lambda f: h5py.Empty("f4"))),
            "loop": ("wrong type", replaced(name, lambda f, n=name: h5py.SoftLink(f"/{n}"))),
            "dangling": ("wrong type", replaced(name, lambda f: h5py.SoftLink("/nowhere"))),
            "external": ("wrong type", replaced(name, lambda f: h5py.ExternalLink(OUTSIDE, "/"))),
            "newline": ("names", replaced(name, lambda f, s=shape: np.full(s, "a\nb", object))),
            "long": ("names", replaced(name, lambda f, s=shape: np.full(s, "x" * 10_000, object))),
        }  # fmt: skip
        found += [Fault(kind, f"any {name} {what}", edited(change))
                  for what, (kind, change) in odd.items()]  # fmt: skip
    found.append(Fault("extra key", "group", edited(lambda f: f.create_group("no such/part"))))
    found.append(Fault("structure", "empty", edited(lambda f: [f.__delitem__(k) for k in list(f)])))
    return found


def of_zarr(path: Path) -> list[Fault]:
    """Of a store: faults of its metadata and of its chunks."""
    found = []
    documents = sorted(p.relative_to(path) for p in path.rglob("zarr.json"))
    for document in documents:
        for fault in of_json(path / document):
            loud = fault.name if fault.name.startswith("any") else f"any {fault.name}"
            found.append(
                Fault(
                    fault.kind,
                    f"{loud} of {document}",
                    lambda p, d=document, f=fault: (_forget(p), f.change(p / d)),
                )
            )
        about = json.loads((path / document).read_bytes())
        if about["node_type"] != "array":
            continue
        n = len(about["shape"])
        for name, shape in {
            "huge": [HUGE] * n,
            "negative": [-1] * n,
            "gib": [2**31, *[1] * (n - 1)],
            "flat": [],
            "cube": [2, 2, 2],
        }.items():
            kind = "huge" if name in ("huge", "gib") else "wrong shape"
            found.append(
                Fault(
                    kind,
                    f"any shape {name} of {document}",
                    lambda p, d=document, s=shape: (
                        _forget(p),
                        (p / d).write_text(
                            json.dumps(json.loads((p / d).read_text()) | {"shape": s})
                        ),
                    ),
                )
            )
        chunk = about["chunk_grid"]["configuration"]["chunk_shape"]
        for name, size in {"zero": 0, "huge": HUGE, "negative": -1, "gib": 2**31}.items():
            grid = with_value(
                about, ("chunk_grid", "configuration", "chunk_shape"), [size] * len(chunk)
            )
            found.append(
                Fault(
                    "huge",
                    f"any chunks {name} of {document}",
                    lambda p, d=document, g=grid: (_forget(p), (p / d).write_text(json.dumps(g))),
                )
            )
    chunks = sorted(
        p.relative_to(path) for p in path.rglob("*") if p.is_file() and p.name != "zarr.json"
    )
    for chunk in chunks:
        for name, change in {
            "gone": lambda p: p.unlink(),
            "empty": put(b""),
            "garbage": put(b"damaged" * 9),
            "cut": bytewise(lambda b: b[:-1]),
            "flipped": bytewise(flip(0.7, 3)),
            "directory": lambda p: (p.unlink(), p.mkdir()),
            "loop": lambda p: (p.unlink(), p.symlink_to(p.name)),
        }.items():
            kind = {
                "gone": "missing chunk",
                "cut": "truncated",
                "empty": "truncated",
                "flipped": "flipped",
                "garbage": "flipped",
            }.get(name, "wrong type")
            found.append(Fault(kind, f"any {chunk} {name}", lambda p, c=chunk, f=change: f(p / c)))
    found.append(Fault("wrong type", "file", lambda p: (shutil.rmtree(p), p.write_bytes(b"x"))))
    found.append(Fault("wrong type", "empty-folder", lambda p: (shutil.rmtree(p), p.mkdir())))
    return found


def _forget(path: Path) -> None:
    """Takes away the copy of all metadata in the root's: else the nodes' own are not read."""
    root = path / "zarr.json"
    try:
        told = json.loads(root.read_text())
    except ValueError:
        return
    told.pop("consolidated_metadata", None)
    root.write_text(json.dumps(told))
