"""Cells to Geneformer's tokens: its dictionaries, and genes ranked by what is unusual of a cell."""

import dataclasses
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from extract.checkpoints import read_json, read_pickle, sha256
from extract.errors import InputError, listed, reading
from extract.models.sequences import TokenSwaps

# Each dictionary by the option that names its file, which its file's name contains, too; with the
# authors' own name for it.
OFFICIAL = {
    "token_dictionary": "token_dictionary",
    "gene_median": "gene_median_dictionary",
    "ensembl_mapping": "ensembl_mapping_dict",
    "gene_name_id": "gene_name_id_dict",
}
_SUFFIXES = (".json", ".pkl", ".pickle")  # of equal content: what anyone can read comes first
_GENERATION = re.compile(r"_gc\d+M")  # the corpus that a dictionary was made of: _gc30M, _gc104M


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What Geneformer knows of genes. A gene is used if it has both a token and a median.

    Attributes:
      tokens: names of all tokens, by id.
      genes: Ensembl ids of the genes used, ascending by token id.
      gene_tokens: their token ids, int64 [genes].
      medians: their typical non-zero value, in counts per 10,000 of a cell, float64 [genes].
      pad: id of <pad>.
      cls, eos: ids of <cls> and <eos>, or None both, in the older models.
      mapping: other Ensembl ids, upper-case, to today's.
      symbols: gene symbols to Ensembl ids, or None where there is no such dictionary.
      files: name and SHA-256 of each dictionary, by option.
    """

    tokens: list[str]
    genes: list[str]
    gene_tokens: np.ndarray
    medians: np.ndarray
    pad: int
    cls: int | None
    eos: int | None
    mapping: Mapping[str, str]
    symbols: Mapping[str, str] | None
    files: dict[str, dict[str, str]]

    def by_id(self) -> tuple[dict[str, int], Callable[[str], str]]:
        """Positions in `genes` by Ensembl id, and what brings an id of a file to that form."""
        known = {gene: i for i, gene in enumerate(self.genes)}

        def current(name: str) -> str:
            name = name.upper()
            for form in (name, name.split(".")[0]):  # as it is, then without its version
                if (found := self.mapping.get(form, form)) in known:
                    return found
            return name

        return known, current

    def by_symbol(self) -> tuple[dict[str, int], Callable[[str], str]]:
        """Positions in `genes` by symbol, and what brings a symbol of a file to that form.

        Raises:
          InputError: there is no dictionary of symbols.
        """
        if self.symbols is None:
            raise InputError(
                'naming="symbol" needs the dictionary of symbols to Ensembl ids: put the authors\' '
                "gene_name_id_dict.pkl beside the other dictionaries, or name it by gene_name_id="
            )
        ids, current = self.by_id()
        genes = {symbol: current(gene) for symbol, gene in self.symbols.items()}
        known = {symbol: ids[gene] for symbol, gene in genes.items() if gene in ids}
        # As they are: upper-cased, the symbols of a mouse would pass for those of a human.
        return known, lambda name: name

    def unusual(
        self, counts: scipy.sparse.csr_matrix, totals: np.ndarray
    ) -> scipy.sparse.csr_matrix:
        """count / total of the cell * 10,000 / median of the gene, float64 [cells, genes].

        Args:
          counts: raw, float64 [cells, genes], columns as `genes` and sorted, no explicit zeros.
          totals: of each cell, over all of its genes, float64 [cells].
        """
        value = counts.data / np.repeat(totals, np.diff(counts.indptr)) * 1e4
        value /= self.medians[counts.indices]
        return scipy.sparse.csr_matrix((value, counts.indices, counts.indptr), counts.shape)

    def rank(
        self, counts: scipy.sparse.csr_matrix, totals: np.ndarray, max_length: int
    ) -> list[np.ndarray]:
        """Each cell's genes by descending `unusual` value, int64 token ids, special ones around.

        Equal values go by token id, so the order of a file's genes changes nothing.

        Args:
          counts, totals: as of `unusual`.
          max_length: tokens a cell, special ones included.
        """
        before, after = self.special
        most = max_length - len(before) - len(after)
        values = self.unusual(counts, totals)
        cells = []
        for start, end in itertools.pairwise(values.indptr):
            order = np.argsort(-values.data[start:end], kind="stable")[:most]
            tokens = self.gene_tokens[values.indices[start:end][order]]
            cells.append(np.concatenate([before, tokens, after]).astype(np.int64))
        return cells

    @property
    def special(self) -> tuple[list[int], list[int]]:
        """Ids of the tokens at either end of a cell."""
        before, after = ([] if i is None else [i] for i in (self.cls, self.eos))
        return before, after


@dataclasses.dataclass(frozen=True)
class RankSwaps(TokenSwaps):
    """`TokenSwaps` of Geneformer: a gene is taken out of a ranking and put where its value belongs.

    `values` are those of `Vocabulary.unusual`, each by the total of its own cell: what a model of
    ranks knows of expression. The other genes keep their order.

    Attributes:
      ids: token id of each gene, int64 [genes], ascending.
      most: gene tokens a cell.
    """

    ids: np.ndarray
    most: int

    def seen(self, cell: int, genes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """See `TokenSwaps.seen`: how many others come first; `most` where it has no token."""
        row = self.values[cell]
        order = np.argsort(-row.data, kind="stable")
        descending, columns = -row.data[order], row.indices[order]
        # Of others with an equal value those of lower ids come first.
        first, last = (np.searchsorted(descending, -values, side) for side in ("left", "right"))
        place = [
            left + np.searchsorted(columns[left:right], gene)
            for gene, left, right in zip(genes, first, last, strict=True)
        ]
        own = np.full(len(self.genes), len(order))
        own[columns] = np.arange(len(order))
        place = np.array(place, np.int64)
        place -= own[genes] < place  # itself is no other
        return np.where(values == 0, self.most, np.minimum(place, self.most))

    def tokens(
        self, cell: int, genes: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `TokenSwaps.tokens`."""
        row = self.values[cell]
        dense = np.zeros(len(self.genes))
        dense[row.indices] = row.data
        dense[genes] = values
        columns = np.flatnonzero(dense)
        ranked = columns[np.argsort(-dense[columns], kind="stable")[: self.most]]
        return self.ids[ranked], dense[ranked]


def read_vocabulary(
    folders: Sequence[Path], vocab_size: int, given: Mapping[str, str | Path | None]
) -> Vocabulary:
    """The dictionaries in `folders` that fit a model of `vocab_size` tokens.

    Args:
      folders: where to look, for names that contain those of `OFFICIAL`.
      given: files named by the user, by option; they win. Beside the token dictionary among them
        the others are looked for first.

    Raises:
      InputError: dictionaries that are missing, do not fit, are damaged, more than one, or of
        different generations (_gc30M, _gc104M) unless all of them were named.
    """
    beside = [Path(file).parent] if (file := given.get("token_dictionary")) else []
    paths = {
        option: [Path(file)]
        if (file := given.get(option))
        else _candidates(beside, option) or _candidates(folders, option)
        for option in OFFICIAL
    }
    chosen: dict[str, Path] = {}
    chosen["token_dictionary"], ids = _fitting(paths["token_dictionary"], folders, vocab_size)
    # Dictionaries of one generation share the end of their names: _gc104M.
    tag = chosen["token_dictionary"].stem.partition(OFFICIAL["token_dictionary"])[2]
    for option in list(OFFICIAL)[1:]:
        if paths[option]:
            chosen[option] = _the_one(paths[option], option, tag)
    if "gene_median" not in chosen:
        raise InputError(_missing("gene_median", [*beside, *folders]))
    generations = {tag for path in chosen.values() for tag in _GENERATION.findall(path.stem)}
    if len(generations) > 1 and not all(given.get(option) for option in chosen):
        raise InputError(
            f"{listed(chosen.values())} are of different generations "
            f"({listed(sorted(generations))}): keep those of one, or, if it is meant, name each "
            f"file: {', '.join(f'{option}=' for option in chosen)}"
        )

    def table(option: str, kind: Callable[[Any], Any]) -> dict[str, Any] | None:
        return _read(chosen[option], kind) if option in chosen else None

    medians = table("gene_median", float)
    tokens = sorted(ids, key=ids.__getitem__)
    genes = [name for name in tokens if not _special(name) and name in medians]
    if not genes:
        raise InputError(
            f"{chosen['gene_median']} has no gene of {chosen['token_dictionary']}: they do not "
            "belong together"
        )
    if bad := [name for name in genes if not 0 < medians[name] < np.inf]:
        raise InputError(f"{chosen['gene_median']}: medians must be positive, not so {listed(bad)}")
    if "<pad>" not in ids or ("<cls>" in ids) != ("<eos>" in ids):
        special = [name for name in tokens if _special(name)]
        raise InputError(
            f"{chosen['token_dictionary']} must have <pad>, and both <cls> and <eos> or neither; "
            f"it has {listed(special, 9) or 'no special token'}"
        )
    return Vocabulary(
        tokens=tokens,
        genes=genes,
        gene_tokens=np.array([ids[name] for name in genes], np.int64),
        medians=np.array([medians[name] for name in genes], np.float64),
        pad=ids["<pad>"],
        cls=ids.get("<cls>"),
        eos=ids.get("<eos>"),
        mapping=table("ensembl_mapping", str) or {},
        symbols=table("gene_name_id", str),
        files={
            option: {"file": path.name, "sha256": sha256(path)} for option, path in chosen.items()
        },
    )


def _special(name: str) -> bool:
    return name.startswith("<")


def _candidates(folders: Sequence[Path], option: str) -> list[Path]:
    """Files of a dictionary; of one name only the first of `_SUFFIXES`."""
    found: dict[Path, Path] = {}
    for folder in folders:
        for suffix in _SUFFIXES:
            for path in sorted(folder.glob(f"*{option}*{suffix}")):
                found.setdefault(path.with_suffix(""), path)
    return list(found.values())


def _fitting(
    paths: Sequence[Path], folders: Sequence[Path], vocab_size: int
) -> tuple[Path, dict[str, int]]:
    """The one token dictionary with an id for every row of the model's embedding."""
    if not paths:
        raise InputError(_missing("token_dictionary", folders))
    tables = {path: _read(path, operator.index) for path in paths}
    wanted = list(range(vocab_size))
    fitting = [path for path, ids in tables.items() if sorted(ids.values()) == wanted]
    if not fitting:
        sizes = [
            f"{path} has {len(ids)} tokens and largest id {max(ids.values(), default='-')}"
            for path, ids in tables.items()
        ]
        raise InputError(
            f"the model has {vocab_size} tokens (vocab_size of its config.json), with ids 0 .. "
            f"{vocab_size - 1}; {listed(sizes)}: name the dictionary it was trained with by "
            "token_dictionary="
        )
    if len(fitting) > 1:
        raise InputError(_several(fitting, "token_dictionary"))
    return fitting[0], tables[fitting[0]]


def _the_one(paths: Sequence[Path], option: str, tag: str) -> Path:
    """Of several dictionaries that of the token dictionary's generation, else the official one."""
    for ending in (OFFICIAL[option] + tag, OFFICIAL[option]):
        if len(paths) > 1:
            paths = [path for path in paths if path.stem.endswith(ending)] or paths
    if len(paths) > 1:
        raise InputError(_several(paths, option))
    return paths[0]


def _missing(option: str, folders: Sequence[Path]) -> str:
    return (
        f"there is no file named *{option}* ({listed(_SUFFIXES)}) in {listed(folders)}; name the "
        f"folder of Geneformer's dictionaries by dictionaries=, or the file by {option}="
    )


def _several(paths: Sequence[Path], option: str) -> str:
    return f"more than one dictionary would do: {listed(paths)}; name one of them by {option}="


def _read(path: Path, kind: Callable[[Any], Any]) -> dict[str, Any]:
    """A dictionary of names with values of one kind.

    Raises:
      InputError: damage, anything else.
    """
    found = read_json(path) if path.suffix == ".json" else read_pickle(path)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{path} is no dictionary of names")
    with reading(path, "is no dictionary for this use"):
        return {name: kind(value) for name, value in found.items()}
