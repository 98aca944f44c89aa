"""What may be wrong with any file: faults of bytes and of paths, all seeded.

A fault changes ONE file (or folder, of zarr) that a reader's valid input has; `catalogue.of` lists
those that make sense of a format. Pickles of theirs would make the folder `MARKER` if anybody ran
them.
"""

import dataclasses
import gzip
import io
import os
import pickle
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MARKER = Path(tempfile.gettempdir()) / f"hostile-pickle-ran-{os.getpid()}"
HUGE = 2**62
NAMES = {
    "newline": "a\nb", "html": "<img src=x onerror=alert(1)>", "long": "x" * 10_000,
    "parent": "../../etc/passwd", "absolute": "/etc/passwd", "nul": "a\0b", "escape": "\x1b[2J",
    "empty": "",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fault:
    """kind: the class it is counted under. change: of the file or folder at a path, in place."""

    kind: str
    name: str
    change: Callable[[Path], Any]

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"


def bytewise(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A function of a file's content as one of the file."""
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def put(content: bytes) -> Callable[[Path], None]:
    """Puts other content in the file's place."""
    return bytewise(lambda _: content)


def of_paths() -> list[Fault]:
    def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
        def change(path: Path) -> None:
            path.unlink()
            make(path)

        return change

    faults = {
        "missing": lambda path: None,
        "directory": lambda path: path.mkdir(),
        "fifo": os.mkfifo,
        "symlink-loop": lambda path: path.symlink_to(path.name),
        "device": lambda path: path.symlink_to("/dev/zero"),
    }
    found = [Fault("wrong type", name, replaced(make)) for name, make in faults.items()]
    if os.geteuid():  # root reads everything
        found.append(Fault("wrong type", "unreadable", lambda path: path.chmod(0)))
    return found


def of_bytes(random_: random.Random, flips: int) -> list[Fault]:
    cuts = {
        "0": lambda b: b"", "1": lambda b: b[:1], "half": lambda b: b[: len(b) // 2],
        "all-but-one": lambda b: b[:-1],
    }  # fmt: skip
    found = [Fault("truncated", name, bytewise(cut)) for name, cut in cuts.items()]
    for _ in range(flips):
        place = random_.random()
        bit = random_.randrange(8)
        found.append(Fault("flipped", f"{place:.6f}.{bit}", bytewise(flip(place, bit))))
    found += [Fault("wrong format", name, put(content)) for name, content in FOREIGN.items()]
    return found


def flip(place: float, bit: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        flipped = bytearray(content)
        if flipped:
            flipped[int(place * len(flipped))] ^= 1 << bit
        return bytes(flipped)

    return change


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.how = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how


def bombs() -> dict[str, bytes]:
    """Pickles that would make `MARKER`, by the way they would."""
    marker = str(MARKER)
    inner = pickle.dumps(Call(os.mkdir, marker))
    array = np.empty(1, object)
    array[0] = Call(os.mkdir, marker)
    return {
        **{f"protocol-{i}": pickle.dumps(Call(os.mkdir, marker), i) for i in (0, 2, 4)},
        "eval": pickle.dumps(Call(eval, f"__import__('os').mkdir({marker!r})"), 2),
        "in-dict": pickle.dumps({"model_state_dict": {"a": Call(os.mkdir, marker)}}, 2),
        "in-array": pickle.dumps(array, 2),
        "nested": pickle.dumps(Call(pickle.loads, inner), 2),
        "instance": f"(S'{marker}'\nios\nmkdir\n.".encode(),
    }


def zipped(**members: bytes) -> bytes:
    """A zip archive; "__" in a name stands for "/"."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return written.getvalue()


def npy(header: dict[str, Any] | str, content: bytes = bytes(64)) -> bytes:
    """An .npy file of version 1 whose header says anything."""
    text = (header if isinstance(header, str) else repr(header)).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def array(value: np.ndarray) -> bytes:
    written = io.BytesIO()
    np.save(written, value, allow_pickle=True)
    return written.getvalue()


FOREIGN: dict[str, bytes] = {
    "png": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "html": b"<!doctype html><title>404</title><p>Not found\n",
    "json": b'{"a": [1, 2]}\n',
    "numpy": array(np.arange(6.0).reshape(2, 3)),
    "pickle": bombs()["protocol-2"],
    "zip-of-pickle": zipped(archive__data__pkl=bombs()["protocol-2"], data__pkl=b"N."),
    "gzip": gzip.compress(b"text\n", mtime=0),
    "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "random": random.Random(0).randbytes(200),
}
