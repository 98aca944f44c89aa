"""What one dictionary is, as independent choices, and the published presets of them.

`Architecture` holds the static choices: they shape the compiled program, so only members that agree
on all of them train inside one. `SAEConfig` adds the traced ones, which may differ per member.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from sae_jax.errors import InputError

CHOICES: dict[str, tuple[str, ...]] = {
    "activation": ("relu", "topk"),
    "pre_bias": ("none", "free", "tied"),
    "decoder_norm": ("free", "unit"),
    "decoder_bias": ("free", "none"),
    "init": ("torch", "tied"),
    "reduction": ("sum", "mean"),
    "input_normalization": ("none", "zscore", "scalar"),
    "auxiliary": ("none", "auxk"),
    "schedule": ("constant", "linear", "cosine"),
    "clipping": ("none", "norm"),
}

# Fields that mean something under one value of a choice only.
USED_WITH: dict[str, tuple[str, str]] = {
    "l1_weight": ("activation", "relu"),
    "l1_warmup": ("activation", "relu"),
    "k": ("activation", "topk"),
    "k_aux": ("auxiliary", "auxk"),
    "aux_weight": ("auxiliary", "auxk"),
    "dead_steps": ("auxiliary", "auxk"),
    "clip_norm": ("clipping", "norm"),
}

# Each preset: the fields it sets, then the fields it leaves to the user without a default.
PRESETS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # Schuster, appendix A.1: z = ReLU(W x + b), x' = W' z + b'.
    "vanilla": ({"activation": "relu"}, ("l1_weight",)),
    # Schuster's "ReLU", after Bricken et al. 2023: a learned bias is added before encoding. The
    # authors' code keeps it free of the decoder bias (x + b_pre, zero at the start).
    "bricken": ({"activation": "relu", "pre_bias": "free"}, ("l1_weight",)),
    # Schuster's TopK: k is a percentage of the latents, top-k of pre-activations and then ReLU (so
    # fewer than k may be active), no L1 and no auxiliary loss.
    "topk_schuster": ({"activation": "topk"}, ("k_percent",)),
    # Gao et al. 2024: TopK with tied start, unit decoder, and the auxiliary loss for dead latents.
    "topk": (
        {
            "activation": "topk",
            "pre_bias": "tied",
            "decoder_norm": "unit",
            "init": "tied",
            "auxiliary": "auxk",
        },
        ("k",),
    ),
    # Kendiukhov, section 3.3; the reduction is that of the code, in which its weights 1, 3 and 10
    # are given (as equation 4 is printed they would be .25, .75 and 2.5 at 512 -> 2048).
    "kendiukhov": (
        {
            "activation": "relu",
            "pre_bias": "tied",
            "decoder_norm": "unit",
            "reduction": "mean",
            "input_normalization": "zscore",
            "learning_rate": 3e-4,
            "batch_size": 512,
            "schedule": "cosine",
            "clipping": "norm",
        },
        ("l1_weight",),
    ),
    # Claye et al.: A' = U D^T, no biases beside the encoder's; their k is about .016 n_latents.
    "claye": (
        {
            "activation": "topk",
            "decoder_bias": "none",
            "auxiliary": "auxk",
            "k_aux": 512,
            "batch_size": 1024,
        },
        ("k",),
    ),
}


# Ranges of the numeric fields: the least integer; whether a real must be above 0 or may be 0.
MOST = 2**31 - 1  # of what XLA counts in 32 bits
INTEGERS = {
    "d_in": 1, "n_latents": 1, "batch_size": 1, "lr_warmup": 0, "l1_warmup": 0, "dead_steps": 1,
}  # fmt: skip
REALS = {"learning_rate": True, "l1_weight": False, "aux_weight": False, "clip_norm": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The choices that shape the program; equal architectures train together.

    Attributes:
      d_in: dimensions of the embedding.
      n_latents: latents in the dictionary; exact, widths are never padded.
      activation: `relu`, or `topk` (the k largest pre-activations of a row, then ReLU).
      pre_bias: what is added to the input before encoding: `none`; `free`, a parameter of its own
        (x + b_pre); `tied`, minus the decoder's bias (x - b_dec).
      decoder_norm: `free`, or `unit`: the gradient is projected and every latent's direction
        renormalised after each step, so what is saved has unit norm.
      decoder_bias: `free`, or `none` (Claye: A' = U D^T).
      init: `torch`, the fan-in uniform of `torch.nn.Linear`; `tied`, unit decoder directions and
        the encoder their transpose.
      reduction: `sum`, as equation 3 of Schuster is printed: squared error and |z| are summed over
        dimensions and latents, then averaged over the batch; `mean` averages over those too, as the
        authors' code does. The same L1 weight means different things:
        weight_sum = weight_mean * d_in / n_latents.
      input_normalization: `none`; `zscore` per dimension; `scalar`, one factor that brings the mean
        squared norm to d_in. Statistics travel with the dictionary and `encode` applies them.
      auxiliary: `none`, or `auxk`: latents that are dead (see `dead_steps`) also reconstruct what
        the others left over, without the decoder's bias (Gao et al. 2024, A.2).
      schedule: of the learning rate after its warm-up: `constant`, or `linear` or `cosine` to 0 at
        the last step.
      clipping: `none`, or `norm`: gradients of a larger global norm than `clip_norm` are scaled.
      batch_size: rows a step.
    """

    d_in: int
    n_latents: int
    activation: str = "relu"
    pre_bias: str = "none"
    decoder_norm: str = "free"
    decoder_bias: str = "free"
    init: str = "torch"
    reduction: str = "sum"
    input_normalization: str = "none"
    auxiliary: str = "none"
    schedule: str = "constant"
    clipping: str = "none"
    batch_size: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAEConfig(Architecture):
    """One dictionary to train: an architecture and its own hyperparameters.

    Attributes:
      learning_rate: Adam's, before warm-up and schedule.
      lr_warmup: steps in which the learning rate rises from 0 to itself, linearly.
      l1_weight: factor of the |z| term, in the scale of `reduction`.
      l1_warmup: steps in which the L1 weight rises from 0 to itself, linearly.
      k: active latents a row at most; for `topk` only, in 1 .. n_latents.
      k_aux: dead latents that take part in the auxiliary loss of a row, at most; None for 512 or
        all there are.
      aux_weight: factor of the auxiliary loss, which has the scale of the reconstruction's.
      dead_steps: steps without a single activation after which a latent is dead.
      clip_norm: see `clipping`.
      seed: of the initialisation and of nothing else.
      name: of the preset it came from; for tables, never for arithmetic.

    Raises:
      InputError: a value out of its range, or one that the architecture has no use for.
    """

    learning_rate: float = 1e-3
    lr_warmup: int = 0
    l1_weight: float = 0.0
    l1_warmup: int = 0
    k: int | None = None
    k_aux: int | None = None
    aux_weight: float = 1 / 32
    dead_steps: int = 256
    clip_norm: float = 1.0
    seed: int = 0
    name: str = "custom"

    def __post_init__(self) -> None:
        for field in (*INTEGERS, "seed", "k", "k_aux"):
            if isinstance(getattr(self, field), np.integer):
                object.__setattr__(self, field, int(getattr(self, field)))
        for field in REALS:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise InputError(f"{field}={value!r} must be a number")
            object.__setattr__(self, field, float(value))
        for field, allowed in CHOICES.items():
            if not (isinstance(getattr(self, field), str) and getattr(self, field) in allowed):
                raise InputError(
                    f"{field}={getattr(self, field)!r} is not one of {', '.join(allowed)}"
                )
        for field, low in INTEGERS.items():
            _check_integer(field, getattr(self, field), low=low)
        _check_integer("seed", self.seed, low=0, high=2**32 - 1)
        for field, positive in REALS.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
                bound = "above 0" if positive else "at least 0"
                raise InputError(f"{field}={value!r} must be finite and {bound}")
        if self.activation == "topk":
            if self.k is None:
                raise InputError("activation='topk' needs k, the active latents a row")
            _check_integer("k", self.k, low=1, high=self.n_latents)
        elif self.k is not None:
            raise InputError(f"k={self.k} has no meaning for activation={self.activation!r}")
        if self.k_aux is not None:
            if self.auxiliary == "none":
                raise InputError(f"k_aux={self.k_aux} has no meaning for auxiliary='none'")
            _check_integer("k_aux", self.k_aux, low=1)
        if self.pre_bias == "tied" and self.decoder_bias == "none":
            raise InputError("pre_bias='tied' subtracts the decoder's bias; decoder_bias is 'none'")

    @classmethod
    def preset(cls, preset: str, /, **fields: Any) -> Self:
        """A published architecture by name; any field may be given beside it.

        `topk_schuster` takes `k_percent` of n_latents: k = max(1, int(n_latents * percent / 100)).

        Raises:
          InputError: an unknown preset or field, or one that the preset needs and was not given.
        """
        fixed, required = preset_fields(preset)
        missing = [name for name in ("d_in", "n_latents", *required) if name not in fields]
        if missing:
            raise InputError(f"preset {preset!r} needs {', '.join(missing)}")
        if "k_percent" in required:
            if "k" in fields:
                raise InputError(f"preset {preset!r} takes k_percent, not k={fields['k']!r}")
            percent = fields.pop("k_percent")
            if not (isinstance(percent, numbers.Real) and 0 < percent <= 100):
                raise InputError(f"k_percent={percent!r} must be a number in (0, 100]")
            _check_integer("n_latents", fields["n_latents"], low=1)
            fields["k"] = max(1, int(fields["n_latents"] * percent / 100))
        return cls.from_dict({**fixed, "name": preset, **fields})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """From a mapping of fields, as read from cfg.json; an unknown name is refused."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise InputError(
                f"SAEConfig has no field {', '.join(unknown)}; it has {', '.join(known)}"
            )
        absent = sorted({"d_in", "n_latents"} - set(fields))
        if absent:
            raise InputError(f"SAEConfig needs {' and '.join(absent)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, in JSON's types."""
        return dataclasses.asdict(self)

    @property
    def architecture(self) -> Architecture:
        """The static part: the key by which members are gathered into one program."""
        names = (field.name for field in dataclasses.fields(Architecture))
        return Architecture(**{name: getattr(self, name) for name in names})


def unused_fields(preset: str) -> set[str]:
    """Fields that mean nothing under a preset's choices, as axes of a grid for instance."""
    fixed, required = preset_fields(preset)
    chosen = {**{field.name: field.default for field in dataclasses.fields(SAEConfig)}, **fixed}
    unused = {field for field, (choice, value) in USED_WITH.items() if chosen[choice] != value}
    return unused | ({"k"} if "k_percent" in required else {"k_percent"})


def preset_fields(preset: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields a preset sets, and those it requires. Raises InputError for an unknown one."""
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


def _check_integer(field: str, value: Any, *, low: int, high: int | None = None) -> None:
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    most = MOST if high is None else high
    if not integer or value < low or value > most:
        bounds = f"in {low} .. {most}" if integer and value > low else f"at least {low}"
        bounds = bounds if high is None else f"in {low} .. {high}"
        raise InputError(f"{field}={value!r} must be an integer {bounds}")
