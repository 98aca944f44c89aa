"""The features that several dictionaries agree on, as one dictionary.

What comes back whatever the seed (`stability`) is more likely to be of the data than what does not.
A consensus keeps a feature once, with the mean direction of those that agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse import hstack

from analysis import matching
from analysis.features import Matrix
from analysis.stability import Replication, directions
from sae_jax.dictionary import Dictionary
from sae_jax.errors import InputError

PER_LATENT = ("relu", "jump_relu", "batch_topk", "gated")  # what fires depends on no other latent


@dataclass(frozen=True, eq=False)
class Consensus:
    """The features that several dictionaries agree on, as one dictionary.

    A feature's code is that of the first dictionary that has it, its home, as that one encodes (a
    top-k is taken among all of the home's latents), times the norm of its direction there. Its
    direction is the mean of its members' unit directions, scaled to norm 1. Reconstructions lack
    what did not replicate.

    directions: [features, d], unit rows, in the embedding's own units.
    bias: mean of what the dictionaries decode no code to [d].
    members: a row per consensus feature and dictionary that has it, the home first: `consensus`,
        `dictionary`, `feature`, `cosine` (with the consensus direction).
    dictionaries: those it was made of.
    """

    directions: np.ndarray
    bias: np.ndarray
    members: pd.DataFrame
    dictionaries: Sequence[Dictionary]

    @property
    def decoder(self) -> np.ndarray:
        """The directions, under the name that baselines have for them."""
        return self.directions

    def encode(self, x: np.ndarray, sparse: bool = False) -> Matrix:
        """Codes [rows, features] of embedding rows x [rows, d]."""
        parts, order = [], []
        for position, homes in self._homes():
            own = self.dictionaries[position]
            codes = own.encode(x, sparse=True)[:, homes["feature"].to_numpy()]
            parts.append(codes.multiply(homes["norm"].to_numpy()[None, :]))
            order.append(homes["consensus"].to_numpy())
        codes = hstack(parts, format="csr")[:, np.argsort(np.concatenate(order))]
        return codes if sparse else codes.toarray()

    def decode(self, z: Matrix) -> np.ndarray:
        """Reconstructions [rows, d] of codes z [rows, features]."""
        return z @ self.directions + self.bias

    def dictionary(self, x: np.ndarray | None = None) -> Dictionary:
        """The same as a `sae_jax.Dictionary`, to save, to steer with and to browse.

        Normalisation and pre-bias are folded into its weights; a batch_topk becomes the jump_relu
        that it is outside training. The code of a topk depends on latents that are not here: given
        rows, it becomes a jump_relu too, each latent with the threshold at which it is active in as
        many of them as at home. Its codes then are not quite those of `encode`; provenance says
        how many of them are (`agreement`, active in both over active in either).

        Args:
            x: rows [rows, d] of the embedding, to set a topk's thresholds by; else not used.

        Raises:
            InputError: topk without rows, or with rows in which a consensus feature is not active.
        """
        folded = [each.fold() for each in self.dictionaries]
        config = folded[0].config
        thresholds = None
        if config.activation not in PER_LATENT:
            if x is None:
                raise InputError(
                    f"activation={config.activation!r}: a code depends on the latents left out, so "
                    "no dictionary of the consensus features has the same codes; use `encode`, or "
                    "give rows x to set thresholds by."
                )
            thresholds = self._thresholds(x)
        n = len(self.directions)
        found: dict[str, np.ndarray] = {}
        for position, homes in self._homes():
            own, place = homes["feature"].to_numpy(), homes["consensus"].to_numpy()
            columns = _scaled(folded[position], own, homes["norm"].to_numpy())
            for name, values in columns.items():
                found.setdefault(name, np.empty((*values.shape[:-1], n), values.dtype))
                found[name][..., place] = values
        if thresholds is not None:
            found["log_threshold"] = np.log(thresholds).astype(np.float32)
        cut = thresholds is not None or config.activation == "batch_topk"
        config = replace(
            config, n_latents=n, activation="jump_relu" if cut else config.activation,
            k=None, decoder_norm="unit", decoder_bias="free", nesting="none", auxiliary="none",
            k_aux=None, sparsity_control="none", target_l0=None, name="consensus",
        )  # fmt: skip
        dtype = folded[0].params.encoder.dtype
        params = folded[0].params.replace(
            **found, decoder=self.directions.astype(dtype), decoder_bias=self.bias.astype(dtype)
        )
        about = {"consensus_of_seeds": [each.config.seed for each in self.dictionaries]}
        made = Dictionary(config, params, None, about)
        if thresholds is None:
            return made
        own, cut_off = self.encode(x, sparse=True) > 0, made.encode(x, sparse=True) > 0
        both = own.multiply(cut_off).nnz
        return replace(made, provenance={**about, "agreement": both / (own + cut_off).nnz})

    def _thresholds(self, x: np.ndarray) -> np.ndarray:
        """Per feature what its pre-activation, times the norm, must exceed to be active in as many
        of the rows x as at home [features]."""
        found = np.empty(len(self.directions))
        for position, homes in self._homes():
            home = self.dictionaries[position]
            own = homes["feature"].to_numpy()
            active = home.encode(x, sparse=True)[:, own].getnnz(axis=0)
            if (silent := np.flatnonzero(active == 0)).size:
                raise InputError(
                    f"feature {own[silent[0]]} of dictionary {position} is active in none of the "
                    f"{len(x)} rows: no threshold can be set by them."
                )
            params = home.fold().params
            before = np.maximum(x @ params.encoder[:, own] + params.encoder_bias[own], 0)
            for code, n, number, norm in zip(
                before.T, active, homes["consensus"], homes["norm"], strict=True
            ):
                falling = -np.sort(-code)
                below = falling[n] if n < len(falling) else 0.0
                found[number] = norm * (falling[n - 1] + below) / 2
        return found

    def _homes(self) -> list[tuple[int, pd.DataFrame]]:
        """Per home dictionary its consensus features, with the norm of their directions there."""
        homes = self.members.drop_duplicates("consensus")
        return [
            (
                position,
                own.assign(
                    norm=np.linalg.norm(
                        directions(self.dictionaries[position])[own["feature"]], axis=1
                    )
                ),
            )
            for position, own in homes.groupby("dictionary")
        ]


def consensus(
    dictionaries: Sequence[Dictionary], found: Replication, share: float = 0.5
) -> Consensus:
    """The features replicated, by direction, in at least `share` of the other dictionaries.

    The features that are most like their counterparts come first. One becomes a consensus feature
    together with its counterparts above the null, if those that belong to no other yet are enough
    for the share.

    Args:
        dictionaries: those that `found` is of, alike but for their seeds.
        found: from `replication`.
        share: in (0, 1]; 1 asks for a counterpart in every one.

    Raises:
        InputError: if the dictionaries are not those of `found` or not of one kind, or no feature
            is replicated so often.
    """
    if not 0 < share <= 1:
        raise InputError(f"share={share}: give a number above 0, 1 at most.")
    sizes = found.features.groupby("dictionary").size().tolist()
    if sizes != [each.config.n_latents for each in dictionaries]:
        raise InputError(f"the replication is of dictionaries of {sizes} features, not of these.")
    if len({(each.config.activation, each.config.d_in) for each in dictionaries}) > 1:
        raise InputError("a consensus is of dictionaries of one activation and one embedding.")
    matches = found.matches[found.matches["replicated"] & (found.matches["measure"] == "direction")]
    needed = share * (len(dictionaries) - 1)
    groups = matches.groupby(["a", "feature_a"])
    strength = groups["similarity"].mean()[groups.size() >= needed - 1e-9]
    taken: set[tuple[int, int]] = set()
    rows: list[tuple[int, int, int]] = []
    number = 0
    for key in strength.sort_values(ascending=False, kind="stable").index:
        own = groups.get_group(key)
        free = [m for m in zip(own["b"], own["feature_b"], strict=True) if m not in taken]
        if key in taken or len(free) < needed - 1e-9:
            continue
        group = sorted([key, *free])
        taken.update(group)
        rows += [(number, *member) for member in group]
        number += 1
    if not rows:
        raise InputError(f"no feature is replicated in {share:.0%} of the other dictionaries.")
    members = pd.DataFrame(rows, columns=["consensus", "dictionary", "feature"])
    rows_of = [directions(each) for each in dictionaries]
    own = [rows_of[i][j] for i, j in zip(members["dictionary"], members["feature"], strict=True)]
    units = matching.unit(np.stack(own), "of the consensus")
    sums = np.zeros((number, units.shape[1]))
    np.add.at(sums, members["consensus"].to_numpy(), units)
    mean = matching.unit(sums, "of the consensus")
    cosine = np.einsum("md,md->m", units, mean[members["consensus"]])
    bias = np.mean([_origin(each) for each in dictionaries], axis=0)
    return Consensus(mean, bias, members.assign(cosine=cosine), dictionaries)


def _origin(dictionary: Dictionary) -> np.ndarray:
    """What it decodes no code to [d]."""
    return dictionary.decode(sparse.csr_array((1, dictionary.config.n_latents)))[0]


def _scaled(folded: Dictionary, chosen: np.ndarray, norm: np.ndarray) -> dict[str, np.ndarray]:
    """Parameters of some latents of a folded dictionary whose codes come out times `norm`."""
    config, params = folded.config, folded.params
    found = {"encoder": params.encoder[:, chosen], "encoder_bias": params.encoder_bias[chosen]}
    if config.activation == "gated":  # the gate decides as before
        found["magnitude_gain"] = params.magnitude_gain[chosen] + np.log(norm)
        found["magnitude_bias"] = params.magnitude_bias[chosen] * norm
    else:
        found = {name: values * norm for name, values in found.items()}
    if config.activation in ("jump_relu", "batch_topk"):
        each = np.broadcast_to(params.log_threshold, config.n_latents)[chosen]
        found["log_threshold"] = each + np.log(norm)
    return {name: values.astype(params.encoder.dtype) for name, values in found.items()}
