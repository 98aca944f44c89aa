"""What the process of ours or of a peer is asked to measure, and what it makes of it."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.rows import Row

OURS = "sae_jax"
CHECKED_EPOCHS = 2


@dataclasses.dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
      peer: its name, or `OURS`.
      row: what to train.
      problem: .npz of rows, orders [epochs, steps, batch] and first weights; ours writes it.
      seconds: a peer trains for so long in each measurement.
    """

    peer: str
    row: Row
    problem: str
    seconds: float

    def to_json(self) -> str:
        """The argument of the process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "row": Row(**fields["row"])})


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Ours or a peer, ready to be measured.

    Attributes:
      about: JSON's types; `losses` [2, CHECKED_EPOCHS] is the mean loss of the first and the last
        configuration in each of the first epochs, `setting` and `version` are text.
      measure: ours trains from seeds to weights, a peer goes on where it stopped, and starts its
        next configuration when one has had its epochs; returns the config-steps done.
    """

    about: dict[str, Any]
    measure: Callable[[], int]
