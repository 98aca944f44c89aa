"""Faults of text, of gzip and of JSON."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile.faults import HUGE, NAMES, Fault, bytewise, put


def of_text(path: Path) -> list[Fault]:
    whole = path.read_bytes()
    lines = whole.decode().splitlines()
    mark = {".gmt": "\t", ".gaf": "\t", ".tsv": "\t", ".csv": ","}.get(path.suffix, " ")
    last = lines[-1]
    found = [
        Fault("encoding", name, put(content))
        for name, content in {
            "bom": b"\xef\xbb\xbf" + whole, "utf-16": whole.decode().encode("utf-16"),
            "latin-1": whole.replace(b"i", "é".encode("latin-1"), 1) + b"\xe9\n",
            "nul": whole + b"\0\0\0\n", "crlf": whole.replace(b"\n", b"\r\n"),
            "cr": whole.replace(b"\n", b"\r"), "no-newline": whole.rstrip(b"\n"),
            "controls": whole + b"\x01\x02\x1b[2J\n", "surrogate": whole + b"\xed\xa0\x80\n",
        }.items()
    ]  # fmt: skip
    found += [
        Fault("structure", name, put(content.encode()))
        for name, content in {
            "blank-lines": "\n\n".join(lines) + "\n\n",
            "only-blank": "\n \n\t\n",
            "first-line-gone": "\n".join(lines[1:]) + "\n",
            "first-line-alone": lines[0] + "\n",
            "duplicate-line": "\n".join([*lines, last]) + "\n",
            "other-separator": whole.decode().replace(mark, "|"),
            "a-field-more": "\n".join([*lines[:-1], last + mark + "more"]) + "\n",
            "a-field-less": "\n".join([*lines[:-1], last.rpartition(mark)[0]]) + "\n",
            "quote": whole.decode() + '"',
            "quoted": whole.decode().replace("\n", '\n"', 1),
            "one-long-line": mark.join(["x" * 100] * 2000),
            "columns-twice": "\n".join([lines[0] + mark + lines[0], *lines[1:]]) + "\n",
        }.items()
    ]
    token = re.findall(r"[A-Za-z0-9_:.]{3,}", last)
    for name, text in NAMES.items():
        if token and name != "newline":
            content = "\n".join([*lines[:-1], last.replace(token[0], text)]) + "\n"
            found.append(Fault("names", name, put(content.encode())))
    return found


def of_gzip() -> list[Fault]:
    def inside(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        return bytewise(lambda packed: gzip.compress(change(gzip.decompress(packed)), mtime=0))

    return [
        Fault("encoding", "plain", bytewise(gzip.decompress)),
        Fault("encoding", "twice", bytewise(lambda b: gzip.compress(b, mtime=0))),
        Fault("encoding", "two-members", bytewise(lambda b: b + gzip.compress(b"\n", mtime=0))),
        Fault("encoding", "garbage-after", bytewise(lambda b: b + b"garbage")),
        Fault("encoding", "utf-16", inside(lambda b: b.decode().encode("utf-16"))),
        Fault("huge", "bomb", put(_bomb())),
    ]


def _bomb() -> bytes:
    """1.5 GiB in 1.5 MB."""
    packed = gzip.compress(bytes(2**24), mtime=0)
    return packed * 96


VALUES: dict[str, Any] = {
    "null": None, "true": True, "minus": -1, "zero": 0, "half": 0.5, "2**31": 2**31, "huge": HUGE,
    "googol": 10**400, "1e308": 1e308, "tiny": 5e-324, "text": "x", "number-as-text": "3",
    "surrogate": "\ud800", "list": [], "list-of-one": [1], "object": {}, "nested": {"a": {"b": 1}},
    **{f"name-{name}": text for name, text in NAMES.items()},
}  # fmt: skip


def paths_of(tree: Any, before: tuple[Any, ...] = (), depth: int = 4) -> Iterator[tuple[Any, ...]]:
    """Where the values of a tree of JSON lie; the first two of a list."""
    if before:
        yield before
    if depth and isinstance(tree, dict):
        for key, value in tree.items():
            yield from paths_of(value, (*before, key), depth - 1)
    if depth and isinstance(tree, list):
        for key, value in enumerate(tree[:2]):
            yield from paths_of(value, (*before, key), depth - 1)


def with_value(tree: Any, where: tuple[Any, ...], value: Any) -> Any:
    """A copy of a tree with another value at a place; `KeyError` as the value takes it away."""
    key, *rest = where
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if rest:
        copy[key] = with_value(tree[key], tuple(rest), value)
    elif value is KeyError:
        del copy[key]
    else:
        copy[key] = value
    return copy


def of_json(path: Path) -> list[Fault]:
    whole = path.read_bytes()
    tree = json.loads(whole)

    def dumped(value: Any) -> bytes:
        return json.dumps(value).encode()

    def changed(where: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
        return bytewise(lambda _: dumped(with_value(tree, where, value)))

    def literal(where: tuple[Any, ...], text: str) -> Callable[[Path], None]:
        mark = "here it stands"
        return bytewise(lambda _: dumped(with_value(tree, where, mark)).replace(
            f'"{mark}"'.encode(), text.encode()))  # fmt: skip

    texts = {
        "deep-lists": b"[" * 100_000 + b"]" * 100_000, "deep-objects": b'{"a":' * 100_000,
        "nan": b"NaN", "infinity": b"-Infinity", "1e999": b"1e999", "digits": b"9" * 5000,
        "null": b"null", "list": b"[]", "object": b"{}", "text": b'"text"',
        "comma": whole[:-2] + b",}",
        "comment": b"// comment\n" + whole, "twice": whole + whole, "nul-after": whole + b"\0",
        "half-a-pair": whole.replace(b'"', b'"\\ud800', 1),
    }  # fmt: skip
    found = [Fault("structure", name, put(content)) for name, content in texts.items()]
    found += [
        Fault("encoding", name, put(content))
        for name, content in {
            "bom": b"\xef\xbb\xbf" + whole, "utf-16": whole.decode().encode("utf-16"),
            "utf-32": whole.decode().encode("utf-32"), "crlf": whole.replace(b"\n", b"\r\n"),
            "latin-1": whole.replace(b'"', b'"\xe9', 1), "spaces": b" \n" + whole + b"\n \n",
        }.items()
    ]  # fmt: skip
    if not isinstance(tree, dict):
        return found
    first = next(iter(tree), "a")
    found.append(Fault("extra key", "unknown", put(dumped(tree | {"no such key": [1, "x"]}))))
    doubled = b"{" + f"{json.dumps(first)}: 1e999, ".encode() + whole.lstrip()[1:]
    found.append(Fault("extra key", "twice", put(doubled)))
    for where in paths_of(tree):
        name = ".".join(map(str, where))[:60]
        kept = len(where) == 1 and len(tree) < 12
        found.append(
            Fault("missing key", ("" if kept else "any ") + name, changed(where, KeyError))
        )
        for told, value in VALUES.items():
            kind = "names" if told.startswith("name-") else "wrong value"
            found.append(Fault(kind, f"any {name}={told}", changed(where, value)))
        for text in ("NaN", "1e999", "-Infinity"):
            found.append(Fault("huge", f"any {name}={text}", literal(where, text)))
    return found
