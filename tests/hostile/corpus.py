"""Every reader with every fault that makes sense of its files, one at a time."""

import contextlib
import dataclasses
import functools
import random
import re
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse

from extract.errors import InputError as ExtractionError
from sae_jax import InputError
from sae_jax.errors import MOST as LONGEST
from tests.hostile import catalogue
from tests.hostile.faults import MARKER, Fault
from tests.hostile.readers import READERS, Reader

MEMORY = 200 << 20  # bytes that reading a broken file may take, beyond what the process has
SECONDS = 60
LIGHT = ("truncated", "flipped", "wrong format", "wrong type", "hostile pickle", "missing key")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case.

    verdict: "refused"; "same", what is read of a valid file; "other", something else; "raised",
        another exception than InputError; or what is wrong with the refusal.
    said: the message. left: files that reading left or changed.
    """

    verdict: str
    said: str = ""
    left: tuple[str, ...] = ()


class Slow(BaseException):
    """Reading took longer than `SECONDS`."""


@functools.cache
def valid(name: str) -> tuple[Path, Any]:
    """A folder with the valid input of a reader, and what the reader makes of it."""
    reader = by_name(name)
    home = Path(tempfile.mkdtemp(prefix="hostile-"))
    (home / "valid").mkdir()
    reader.make(home / "valid")
    shutil.copytree(home / "valid", home / "first/valid")  # what reading leaves must not count
    return home / "valid", told(reader.read(home / "first/valid"))


def by_name(name: str) -> Reader:
    """A reader."""
    return next(reader for reader in READERS if reader.name == name)


def cases(reader: Reader, seed: int = 0, thorough: bool = False) -> Iterator[tuple[str, Fault]]:
    """Its files, each with its faults; a sample of those that are many."""
    folder = valid(reader.name)[0]
    for file in reader.files:
        found = catalogue.of(folder / file, seed, thorough)
        if reader.light and not thorough:
            few = [f for f in found if f.kind in LIGHT and not f.name.startswith("any")]
            found = few + [f for f in found if f.name.startswith("any")][:6]
        if reader.slow and not thorough:
            found = random.Random(f"{file}{seed}").sample(found, 9)
        for fault in found:
            yield file, fault


def run(reader: Reader, file: str, fault: Fault, scratch: Path) -> Outcome:
    """One case, in an empty folder of its own."""
    folder, expected = valid(reader.name)
    case = scratch / "case"
    shutil.copytree(folder, case, symlinks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fault.change(case / file)
    return read(reader, file, case, expected)


def read(reader: Reader, file: str, case: Path, expected: Any) -> Outcome:
    """Reads a folder whose file is broken, and judges what comes of it."""
    before = listing(case.parent)
    said, verdict = "", ""
    try:
        with warnings.catch_warnings(), bounded():
            warnings.simplefilter("ignore")
            found = told(reader.read(case))
        verdict = "same" if found == expected else "other"
    except (InputError, ExtractionError) as error:
        said = str(error)
        verdict = _of_message(said, reader, file)
    except Slow:
        verdict = "slow"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        verdict, said = "raised", f"{type(error).__name__}: {error}"
    if MARKER.exists():
        MARKER.rmdir()
        verdict = "ran code"
    said = said.replace(str(case), "DIR")
    left = tuple(sorted(listing(case.parent) ^ before))
    return Outcome(verdict, said, left)


def _of_message(said: str, reader: Reader, file: str) -> str:
    path = Path(file)
    names = (path.name, *reader.named, *(part for part in path.parts[:-1] if "." in part))
    said = re.sub(r"(of other settings|of another sweep):\n.*", "", said, flags=re.DOTALL)
    if "\n" in said or "\r" in said or not all(c.isprintable() for c in said):
        return "not one line"
    if len(said) > LONGEST + 100:  # and the name of the file, maybe
        return "too long"
    if not any(name in said for name in (*names, path.parent.name or path.name)):
        return "names no file"
    return "refused"


def leftovers(reader: Reader, outcome: Outcome) -> tuple[str, ...]:
    """What lies on disk that did not, of a refusal: not the index of a browser, nor what a reader
    is there to make (`Reader.makes`)."""
    if outcome.verdict != "refused":
        return ()
    return tuple(name for name in outcome.left if not name.startswith(reader.makes))


def allowed(reader: Reader, file: str, fault: Fault, outcome: Outcome) -> bool:
    """Whether a case went as it must."""
    if outcome.verdict == "other":  # what a foreign file says cannot be told from what it should
        return file not in reader.checked
    return outcome.verdict in ("refused", "same")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises `Slow` after `SECONDS`, MemoryError beyond `MEMORY`."""

    def stop(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGALRM, stop)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def listing(folder: Path) -> set[str]:
    """What lies in a folder, each file with its size; nothing of the browser's index."""
    found = set()
    for path in folder.rglob("*"):
        about = path.lstat()
        size = "/" if path.is_dir() and not path.is_symlink() else f" {about.st_size}"
        found.add(f"{path.relative_to(folder)}{size}")
    return found


def told(value: Any) -> Any:
    """Anything that readers return, in types that compare."""
    if isinstance(value, np.ndarray | np.generic) or type(value).__module__.startswith("torch"):
        array = np.asarray(value)
        return [str(array.dtype), array.shape, told(array.tolist()) if array.dtype == object
                else array.tobytes()]  # fmt: skip
    if scipy.sparse.issparse(value):
        return [value.shape, told(value.toarray())]
    if isinstance(value, pd.DataFrame | pd.Series | pd.Index | pd.Categorical):
        return [type(value).__name__, repr(value.__reduce__() if False else
                pd.DataFrame(value).to_csv()), str(getattr(value, "dtypes", ""))]  # fmt: skip
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [told(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, dict) or hasattr(value, "items"):
        return [[told(key), told(held)] for key, held in value.items()]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return [told(each) for each in value]
    return repr(value)
