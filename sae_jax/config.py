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
    "activation": ("relu", "topk", "batch_topk", "jump_relu", "gated"),
    "pre_bias": ("none", "free", "tied"),
    "decoder_norm": ("free", "unit"),
    "decoder_bias": ("free", "none"),
    "init": ("torch", "tied"),
    "center": ("none", "geometric_median"),
    "nesting": ("none", "matryoshka"),
    "reduction": ("sum", "mean"),
    "input_normalization": ("none", "zscore", "scalar"),
    "auxiliary": ("none", "auxk"),
    "resampling": ("none", "bricken"),
    "sparsity_control": ("none", "target_l0"),
    "schedule": ("constant", "linear", "cosine"),
    "clipping": ("none", "norm"),
    "decay": ("none", "decoupled"),
}

# Fields that mean something under some values of a choice only: any of those named here.
USED_WITH: dict[str, dict[str, tuple[str, ...]]] = {
    "l1_weight": {"activation": ("relu", "gated")},
    "l1_warmup": {"activation": ("relu", "gated")},
    "l0_weight": {"activation": ("jump_relu",)},
    "l0_warmup": {"activation": ("jump_relu",)},
    "bandwidth": {"activation": ("jump_relu",)},
    "initial_threshold": {"activation": ("jump_relu",)},
    "k": {"activation": ("topk", "batch_topk")},
    "target_l0": {"sparsity_control": ("target_l0",)},
    "levels": {"nesting": ("matryoshka",)},
    "k_aux": {"auxiliary": ("auxk",)},
    "aux_weight": {"auxiliary": ("auxk",)},
    "dead_steps": {"auxiliary": ("auxk",), "resampling": ("bricken",)},
    "resample_every": {"resampling": ("bricken",)},
    "clip_norm": {"clipping": ("norm",)},
    "weight_decay": {"decay": ("decoupled",)},
}

GAO = {
    "activation": "topk",
    "pre_bias": "tied",
    "decoder_norm": "unit",
    "init": "tied",
    "auxiliary": "auxk",
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
    "topk": (GAO, ("k",)),
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
    # Claye et al.: A' = U D^T, no biases beside the encoder's. k, if it is left out, is theirs:
    # .016 n_latents.
    "claye": (
        {
            "activation": "topk",
            "decoder_bias": "none",
            "auxiliary": "auxk",
            "k_aux": 512,
            "batch_size": 1024,
        },
        (),
    ),
    # Bussmann et al. 2024: `topk`, but k is the mean over a batch.
    "batch_topk": ({**GAO, "activation": "batch_topk"}, ("k",)),
    # Bussmann et al. 2025: the first half, quarter, ... of the latents are dictionaries themselves.
    "matryoshka": ({**GAO, "activation": "batch_topk", "nesting": "matryoshka"}, ("k",)),
    # Rajamanoharan et al. 2024, Gated SAEs.
    "gated": (
        {"activation": "gated", "pre_bias": "tied", "decoder_norm": "unit", "init": "tied"},
        ("l1_weight",),
    ),
    # Rajamanoharan et al. 2024, JumpReLU SAEs; their bandwidth .001 is for inputs of norm 1 and
    # billions of tokens (see `SAEConfig`).
    "jump_relu": (
        {
            "activation": "jump_relu",
            "decoder_norm": "unit",
            "init": "tied",
            "input_normalization": "scalar",
        },
        ("l0_weight",),
    ),
    # An L1 dictionary by the L0 that is wanted of it, not by its weight, which does not carry over
    # from one embedding, width or reduction to another.
    "target_l0": (
        {
            "activation": "relu",
            "pre_bias": "tied",
            "decoder_norm": "unit",
            "init": "tied",
            "input_normalization": "scalar",
            "sparsity_control": "target_l0",
            "l1_weight": 1e-2,
        },
        ("target_l0",),
    ),
}


# Ranges of the numeric fields: the least integer; whether a real must be above 0 or may be 0.
MOST = 2**31 - 1  # of what XLA counts in 32 bits
FLOAT32 = np.finfo(np.float32)
INTEGERS = {
    "d_in": 1, "n_latents": 1, "batch_size": 1, "levels": 1, "lr_warmup": 0, "l1_warmup": 0,
    "l0_warmup": 0, "dead_steps": 1, "resample_every": 1,
}  # fmt: skip
REALS = {
    "learning_rate": True, "l1_weight": False, "l0_weight": False, "bandwidth": True,
    "initial_threshold": True, "aux_weight": False, "clip_norm": True, "weight_decay": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The choices that shape the program; equal architectures train together.

    Attributes:
      d_in: dimensions of the embedding.
      n_latents: latents in the dictionary; exact, widths are never padded.
      activation: `relu`; `topk`, the k largest pre-activations of a row, then ReLU; `batch_topk`,
        the k * rows largest of a batch in training, and those above a threshold estimated on the
        way everywhere else, so that a row's codes never depend on the rows beside it; `jump_relu`,
        those above a learned threshold each (Rajamanoharan et al. 2024b); `gated`, which decides
        by one affine map whether a latent fires and by another how much, the two sharing
        directions (Rajamanoharan et al. 2024a).
      pre_bias: what is added to the input before encoding: `none`; `free`, a parameter of its own
        (x + b_pre); `tied`, minus the decoder's bias (x - b_dec).
      decoder_norm: `free`, or `unit`: the gradient is projected and every latent's direction
        renormalised after each step, so what is saved has unit norm.
      decoder_bias: `free`, or `none` (Claye: A' = U D^T).
      init: `torch`, the fan-in uniform of `torch.nn.Linear`; `tied`, unit decoder directions and
        the encoder their transpose.
      center: where a pre-bias starts: `none`, as `init` has it; `geometric_median`, so that the
        geometric median of the training rows is taken from them (Bricken et al. 2023), and the
        decoder's bias starts there.
      nesting: `none`; `matryoshka`: the first half of the latents, the first quarter, ... `levels`
        of them in all, are dictionaries themselves, and the squared error is the mean of theirs
        (Bussmann et al. 2025).
      reduction: `sum`, as equation 3 of Schuster is printed: squared error and |z| are summed over
        dimensions and latents, then averaged over the batch; `mean` averages over those too, as the
        authors' code does. The same L1 weight means different things:
        weight_sum = weight_mean * d_in / n_latents.
      input_normalization: `none`; `zscore` per dimension; `scalar`, one factor that brings the mean
        squared norm to d_in. Statistics travel with the dictionary and `encode` applies them.
      auxiliary: `none`, or `auxk`: latents that are dead (see `dead_steps`) also reconstruct what
        the others left over, without the decoder's bias (Gao et al. 2024, A.2).
      resampling: `none`, or `bricken`: every `resample_every` steps of the first half of training,
        dead latents start anew in the direction of a row that is reconstructed badly.
      sparsity_control: `none`, or `target_l0`: the L1 weight of relu and gated is moved while they
        train until `target_l0` latents are active; for jump_relu the penalty itself becomes
        l0_weight * (L0 / target_l0 - 1)^2.
      schedule: of the learning rate after its warm-up: `constant`, or `linear` or `cosine`
        towards 0, which the step after the last would have.
      clipping: `none`, or `norm`: gradients of a larger global norm than `clip_norm` are scaled.
      decay: `none`, or `decoupled`: `weight_decay` (AdamW's) of encoder and decoder, not of biases.
      levels: see `nesting`.
      batch_size: rows a step.
    """

    d_in: int
    n_latents: int
    activation: str = "relu"
    pre_bias: str = "none"
    decoder_norm: str = "free"
    decoder_bias: str = "free"
    init: str = "torch"
    center: str = "none"
    nesting: str = "none"
    reduction: str = "sum"
    input_normalization: str = "none"
    auxiliary: str = "none"
    resampling: str = "none"
    sparsity_control: str = "none"
    schedule: str = "constant"
    clipping: str = "none"
    decay: str = "none"
    levels: int = 5
    batch_size: int = 128

    @property
    def widths(self) -> tuple[int, ...]:
        """How many of the latents each nested dictionary has, ascending; the last is all."""
        levels = self.levels if self.nesting == "matryoshka" else 1
        return tuple(math.ceil(self.n_latents / 2**i) for i in reversed(range(levels)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SAEConfig(Architecture):
    """One dictionary to train: an architecture and its own hyperparameters.

    Attributes:
      learning_rate: Adam's, before warm-up and schedule.
      lr_warmup: steps in which the learning rate rises from 0 to itself, linearly.
      l1_weight: factor of the |z| term, in the scale of `reduction`; with `sparsity_control` where
        it starts from, above 0.
      l1_warmup: steps in which the L1 weight rises from 0 to itself, linearly.
      l0_weight: factor of the number of active latents, in the scale of `reduction`.
      l0_warmup: steps in which the L0 weight rises from 0 to itself, linearly.
      bandwidth: width of the kernel by which jump_relu's thresholds see pre-activations.
      initial_threshold: of jump_relu. Both are for inputs of unit variance (`scalar`) and thousands
        of steps; Rajamanoharan et al. have .001 for each, and billions of tokens.
      k: active latents a row: at most, for `topk`; in the mean of a batch, for `batch_topk`.
      target_l0: active latents a row that `sparsity_control` aims at, in (0, n_latents].
      k_aux: dead latents that take part in the auxiliary loss of a row, at most; None for 512 or
        all there are.
      aux_weight: factor of the auxiliary loss, which has the scale of the reconstruction's.
      dead_steps: steps without a single activation after which a latent is dead.
      resample_every: see `resampling`; steps.
      clip_norm: see `clipping`.
      weight_decay: see `decay`.
      seed: of the initialisation, and of the rows that `resampling` chooses; of nothing else.
      name: of the preset it came from; for tables, never for arithmetic.

    Raises:
      InputError: a value out of its range, or one that the architecture has no use for.
    """

    learning_rate: float = 1e-3
    lr_warmup: int = 0
    l1_weight: float = 0.0
    l1_warmup: int = 0
    l0_weight: float = 0.0
    l0_warmup: int = 0
    bandwidth: float = 0.5
    initial_threshold: float = 0.5
    k: int | None = None
    target_l0: float | None = None
    k_aux: int | None = None
    aux_weight: float = 1 / 32
    dead_steps: int = 256
    resample_every: int = 1000
    clip_norm: float = 1.0
    weight_decay: float = 0.0
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
        if not isinstance(self.name, str):
            raise InputError(f"name={self.name!r} must be text")
        if any("\ud800" <= letter <= "\udfff" for letter in self.name):  # of no table
            raise InputError(f"name={self.name!r} holds half of a character, which is no text")
        for field, positive in REALS.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
                bound = "above 0" if positive else "at least 0"
                raise InputError(f"{field}={value!r} must be finite and {bound}")
            if value and not float(FLOAT32.tiny) <= value <= float(FLOAT32.max):
                raise InputError(f"{field}={value!r} is no number in float32")
        for field in ("k", "target_l0", "k_aux"):
            choice, values = next(iter(USED_WITH[field].items()))
            chosen = getattr(self, choice)
            if getattr(self, field) is not None and chosen not in values:
                raise InputError(
                    f"{field}={getattr(self, field)!r} has no meaning for {choice}={chosen!r}"
                )
        if self.activation in USED_WITH["k"]["activation"]:
            if self.k is None:
                raise InputError(
                    f"activation={self.activation!r} needs k, the active latents a row"
                )
            _check_integer("k", self.k, low=1, high=self.n_latents)
        if self.k_aux is not None:
            _check_integer("k_aux", self.k_aux, low=1)
        self._check_control()
        self._check_pairs()

    def _check_control(self) -> None:
        if self.sparsity_control == "none":
            return
        if self.activation in USED_WITH["k"]["activation"]:
            raise InputError(
                f"sparsity_control='target_l0': k decides the L0 of activation={self.activation!r}"
            )
        value = self.target_l0
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InputError(
                f"sparsity_control='target_l0' needs a number target_l0, not {value!r}"
            )
        if not 0 < value <= self.n_latents:
            raise InputError(f"target_l0={value!r} must lie in (0, {self.n_latents}]")
        object.__setattr__(self, "target_l0", float(value))
        weight = "l0_weight" if self.activation == "jump_relu" else "l1_weight"
        if getattr(self, weight) == 0:
            raise InputError(f"sparsity_control='target_l0' needs {weight} above 0 to start from")

    def _check_pairs(self) -> None:
        if self.pre_bias == "tied" and self.decoder_bias == "none":
            raise InputError("pre_bias='tied' subtracts the decoder's bias; decoder_bias is 'none'")
        if self.center != "none" and self.pre_bias == "none":
            raise InputError("center='geometric_median' is where a pre-bias starts; there is none")
        if self.activation == "gated" and self.auxiliary == "auxk":
            raise InputError(
                "activation='gated' has an auxiliary loss of its own; auxk is not defined for it"
            )
        if self.nesting == "matryoshka" and self.levels > self.n_latents.bit_length():
            raise InputError(
                f"levels={self.levels}: {self.n_latents} latents cannot be halved so often; at "
                f"most {self.n_latents.bit_length()}"
            )

    @classmethod
    def preset(cls, preset: str, /, **fields: Any) -> Self:
        """A published architecture by name; any field may be given beside it.

        `topk_schuster` takes `k_percent` of n_latents: k = max(1, int(n_latents * percent / 100)).
        `claye` has k = .016 n_latents, at least 1, where none is given.

        Raises:
          InputError: an unknown preset or field, or one that the preset needs and was not given.
        """
        fixed, required = preset_fields(preset)
        activation = fields.get("activation", fixed.get("activation"))
        if not (with_k := activation in USED_WITH["k"]["activation"]):
            required = tuple(name for name in required if name not in ("k", "k_percent"))
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
        if preset == "claye" and with_k and fields.get("k") is None:
            _check_integer("n_latents", fields["n_latents"], low=1)
            fields["k"] = max(1, round(0.016 * fields["n_latents"]))
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


def unused_fields(preset: str, given: Mapping[str, Any] | None = None) -> set[str]:
    """Fields that mean nothing under a preset's choices and those given beside it."""
    fixed, required = preset_fields(preset)
    defaults = {field.name: field.default for field in dataclasses.fields(SAEConfig)}
    chosen = {**defaults, **fixed, **(given or {})}
    unused = {
        field
        for field, uses in USED_WITH.items()
        # A choice that there is not is refused elsewhere, and by its own name.
        if not any(
            chosen[choice] in values or chosen[choice] not in CHOICES[choice]
            for choice, values in uses.items()
        )
    }
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
