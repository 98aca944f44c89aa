"""Which blocks of an unfinished extraction are on disk: a JSON file with a hash of itself."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from extract import disk, manifest
from extract.errors import reading


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far an extraction is.

    Attributes:
      extraction: what all layers are of, in JSON's types, with its `identity`.
      layers: names of the stores, and which layer each is.
      bounds: of cells, where blocks begin and end.
      done: numbers of the blocks that are on disk, ascending.
    """

    extraction: dict[str, Any]
    layers: dict[str, int | str]
    bounds: list[int]
    done: list[int]

    def save(self, path: Path) -> None:
        """In one rename; on the disk when this returns.

        Raises:
          DiskError: the disk takes no more, is read-only or gone.
        """
        fresh, content = path.with_suffix(".new"), _text(dataclasses.asdict(self)).encode()
        with disk.named(path, len(content)):
            with fresh.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
            manifest.sync(path.parent)

    @classmethod
    def load(cls, path: Path) -> "Progress":
        """What was saved.

        Raises:
          InputError: a file of which any byte is not as it was written.
        """
        with reading(path, "is damaged"):
            content = path.read_bytes()
            fields = json.loads(content)
            if not isinstance(fields, dict) or fields.pop("sha256", None) is None:
                raise ValueError("it has no hash of itself (of an older version?)")
            if content != _text(fields).encode():
                raise ValueError("it is not as it was written")
            found = cls(**fields)
            if not found._sound():
                raise ValueError("it is of no extraction")
            return found

    def _sound(self) -> bool:
        """Whether it can be of an extraction; names are of folders, and must lead nowhere else."""
        numbers = [*self.bounds, *self.done]
        return (
            isinstance(self.extraction, dict)
            and bool(self.layers)
            and all(re.fullmatch(r"\w+", name) for name in self.layers)
            and all(type(number) is int for number in numbers)
            and set(self.done) <= set(range(len(self.bounds) - 1))
        )


def _text(fields: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps({"sha256": digest, **fields})
