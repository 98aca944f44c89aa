"""Files of strangers: nothing in a pickle runs, and what is no checkpoint is refused."""

import collections
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from extract import checkpoints
from extract.checkpoints import read_pickle, read_torch_allowing, read_weights
from extract.errors import InputError


class Call:
    """Pickles as a call of `function`, and then of `__setstate__`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.how = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how


def by_name(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument), which need not exist here."""
    text = f"V{argument}\n".encode("raw_unicode_escape")
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + text + b"tR."


def as_pickle(data: bytes, to: Path) -> Path:
    path = to / "data.pkl"
    path.write_bytes(data)
    return path


def as_torch(data: bytes, to: Path) -> Path:
    """A torch file whose pickle is `data`."""
    torch.save({"a": torch.ones(2)}, to / "whole.pt")
    path = to / "model.pt"
    with zipfile.ZipFile(to / "whole.pt") as whole, zipfile.ZipFile(path, "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, data if name.endswith("/data.pkl") else whole.read(name))
    return path


READERS: dict[str, Callable[[bytes, Path], Any]] = {
    "pickle": lambda data, to: read_pickle(as_pickle(data, to)),
    "torch": lambda data, to: read_torch_allowing(as_torch(data, to), inert=("pandas",)),
}


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Callable[[bytes, Path], Any]:
    return READERS[request.param]


def test_the_attack_works_where_nothing_stops_it(tmp_path: Path) -> None:
    # Otherwise the tests below would pass whatever the readers do.
    pickle.loads(pickle.dumps(Call(os.system, f"touch {tmp_path / 'owned'}")))
    assert (tmp_path / "owned").exists()
    path = as_torch(pickle.dumps(Call(os.system, f"touch {tmp_path / 'again'}"), 2), tmp_path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "getoutput"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("importlib", "import_module"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy", "load"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.jit", "load"),
        ("pandasx", "read_pickle"),
    ],
)
def test_calls_are_refused_by_name(
    read: Callable[[bytes, Path], Any], tmp_path: Path, module: str, name: str
) -> None:
    owned = tmp_path / "owned"
    argument = f"touch {owned}" if name in ("system", "getoutput") else f"open('{owned}', 'w')"
    with pytest.raises(InputError, match=rf"{module}.{name}, which is not on the allow-list"):
        read(by_name(module, name, argument), tmp_path)
    assert not owned.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("pandas", "read_pickle"), ("pandas.io.common", "os.system"), ("pandas.eval", "system")],
)
def test_what_pandas_names_is_never_called(tmp_path: Path, module: str, name: str) -> None:
    owned = tmp_path / "owned"
    attack = pickle.dumps(Call(os.system, f"touch {owned}"))
    (tmp_path / "inner.pkl").write_bytes(attack)
    text = f"touch {owned}" if name.endswith("system") else str(tmp_path / "inner.pkl")
    # Protocol 4 looks names with dots up step by step: pandas.io.common imports os.
    data = (
        pickle.PROTO
        + b"\x04"
        + b"".join(
            pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode() for part in (module, name)
        )
    )
    data += pickle.STACK_GLOBAL + pickle.BINUNICODE + len(text).to_bytes(4, "little")
    data += text.encode() + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    found = read_torch_allowing(as_torch(data, tmp_path), inert=("pandas",))
    assert isinstance(found, checkpoints.Inert)
    assert not owned.exists()
    with pytest.raises(InputError, match="not on the allow-list"):
        read_pickle(as_pickle(data, tmp_path))
    with pytest.raises(InputError, match="not on the allow-list"):
        read_torch_allowing(as_torch(data, tmp_path), inert=())
    assert not owned.exists()


class Structured:
    """A dtype of 8 bytes, said afterwards to be an object: NumPy would take bytes for pointers."""

    def __reduce__(self) -> tuple[Any, ...]:
        state = (4, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
        return np.dtype, ("V8", False, True), state


class Laid:
    """An array of that dtype."""

    def __reduce__(self) -> tuple[Any, ...]:
        reconstruct = np._core.multiarray._reconstruct
        state = (1, (1,), Structured(), False, bytes(8))
        return reconstruct, (np.ndarray, (0,), b"b"), state


@pytest.mark.parametrize(
    "attack",
    [
        Call(np.ndarray, (1,), np.dtype("O"), bytes(8)),  # null pointers: harmless if it is built
        Call(np.ndarray, (1 << 20,), np.dtype("f8")),  # memory as it was left
        Laid(),
    ],
    ids=["buffer", "memory", "dtype"],
)
def test_no_array_is_laid_over_bytes(
    read: Callable[[bytes, Path], Any], tmp_path: Path, attack: Any
) -> None:
    with pytest.raises(InputError, match="is refused"):
        read(pickle.dumps(attack, 2), tmp_path)


def harmless() -> dict[str, Any]:
    return {
        "names": np.array(["TP53", None, 3], object),
        "text": np.array(["a", "bcd"]),
        "medians": np.array([[1.5, 2.5], [3.5, np.nan]]).T,
        "counts": np.arange(3, dtype=np.int16),
        "swapped": np.arange(3, dtype=">i4"),
        "mask": np.array([True, False]),
        "scalar": np.float32(0.5),
        "many": collections.OrderedDict(a=[1, {2}, (3.0, None, b"x")]),
        "kinds": collections.defaultdict(dict, x={"y": 1}),
    }


def same(found: Any, expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert isinstance(found[name], np.ndarray)
            assert found[name].dtype.newbyteorder("=") == value.dtype.newbyteorder("=")
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_are_read(read: Callable[[bytes, Path], Any], tmp_path: Path, protocol: int) -> None:
    same(read(pickle.dumps(harmless(), protocol), tmp_path), harmless())


def test_names_of_numpy_1(read: Callable[[bytes, Path], Any], tmp_path: Path) -> None:
    data = pickle.dumps(harmless(), 2)  # there, names are lines
    assert b"cnumpy._core.multiarray\n" in data
    same(read(data.replace(b"cnumpy._core.", b"cnumpy.core."), tmp_path), harmless())


def test_tensors_and_frames(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).reshape(2, 3).T, "half": torch.ones(2, dtype=torch.bfloat16)}
    frame = pd.DataFrame({"loss": [1.0, 2.0]}, index=pd.Index([0, 1], name="epoch"))
    torch.save({"tensors": tensors, "frame": frame, **harmless()}, tmp_path / "model.pt")
    found = read_torch_allowing(tmp_path / "model.pt", inert=("pandas",))
    assert isinstance(found.pop("frame"), checkpoints.Inert)
    for name, tensor in found.pop("tensors").items():
        assert torch.equal(tensor, tensors[name])
    same(found, harmless())
    with pytest.raises(InputError, match=r"it names pandas\.core"):
        read_torch_allowing(tmp_path / "model.pt", inert=())
    with pytest.raises(InputError, match="holds more than tensors"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, share: float) -> None:
    def cut(path: Path) -> Path:
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        return path

    with pytest.raises(InputError, match="is refused"):
        read_pickle(cut(as_pickle(pickle.dumps(harmless()), tmp_path)))
    torch.save(harmless(), tmp_path / "model.pt")
    with pytest.raises(InputError, match="is truncated"):
        read_torch_allowing(cut(tmp_path / "model.pt"), inert=())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(InputError, match=r"there is no .*model\.pt; its folder holds nothing"):
        read_torch_allowing(path, inert=())
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    for inert in ((), ("pandas",)):
        with pytest.raises(InputError, match="TorchScript program, not weights"):
            read_torch_allowing(path, inert=inert)
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="no torch file of today's format"):
        read_torch_allowing(path, inert=())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other.txt", "no checkpoint")
    with pytest.raises(InputError, match="is refused"):
        read_torch_allowing(path, inert=())
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'owned'}")))
    with zipfile.ZipFile(path, "a") as archive:  # a zip to Python, a bare pickle to torch
        archive.writestr("archive/data.pkl", b"N.")
    with pytest.raises(InputError, match="is refused"):
        read_torch_allowing(path, inert=("pandas",))
    assert not (tmp_path / "owned").exists()
