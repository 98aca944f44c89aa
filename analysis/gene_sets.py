"""Gene sets as a sparse 0/1 matrix over the genes that were measured.

Sets come from a GMT file (plain or gzip: name, description, genes, separated by tabs), from the
programs packaged with this library, or from an online collection. Genes are matched by name.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
from scipy import sparse

from sae_jax.errors import InputError

EMBEDDED = "embedded"
SAME = "Are both of the same species and kind (symbols, Ensembl or Entrez ids)?"
ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?")


@dataclass(frozen=True)
class Coverage:
    """What became of the sets that were read.

    n_read, n_kept: sets in the file, and sets in the result.
    too_small, too_large: the dropped sets, each with the number of its genes that were measured.
    n_set_genes, n_found: different genes in all sets read, and how many of them were measured.
    """

    n_read: int
    n_kept: int
    too_small: dict[str, int]
    too_large: dict[str, int]
    n_set_genes: int
    n_found: int

    @property
    def share_found(self) -> float:
        """Share of the sets' genes that were measured, from 0 to 1."""
        return self.n_found / self.n_set_genes

    def __str__(self) -> str:
        return (
            f"{self.n_kept} of {self.n_read} gene sets kept ({len(self.too_small)} too small, "
            f"{len(self.too_large)} too large); {self.n_found} of {self.n_set_genes} of their "
            f"genes measured ({self.share_found:.0%})"
        )


@dataclass(frozen=True, eq=False)
class GeneSets:
    """Gene sets over the measured genes; unpacks as `names, membership = gene_sets`.

    names, descriptions: one per set, in the order of the source.
    membership: 1.0 where the gene belongs to the set [sets, genes], genes in the order asked for.
    coverage: what was kept, what was dropped and why.
    """

    names: list[str]
    membership: sparse.csr_array
    descriptions: list[str]
    coverage: Coverage

    def __iter__(self) -> Iterator[list[str] | sparse.csr_array]:
        return iter((self.names, self.membership))


def load(
    name_or_path: str | Path,
    genes: Sequence[str],
    min_size: int = 20,
    max_size: int = 500,
    organism: str = "Human",
) -> GeneSets:
    """Reads gene sets from wherever they are.

    Args:
        name_or_path: a GMT file; or "embedded" for the immune programs packaged with this library,
            some of them of fewer than 20 genes; or the name of an Enrichr library
            ("GO_Biological_Process_2021"), which is downloaded.
        genes, min_size, max_size: as in `read`.
        organism: of an Enrichr library: Human, Mouse, Yeast, Fly, Fish or Worm.

    Raises:
        InputError: as `read`; or if it is no file and cannot be downloaded.
    """
    if Path(name_or_path).is_file():
        return read(name_or_path, genes, min_size, max_size)
    name = str(name_or_path)
    if name == EMBEDDED:
        packaged = resources.files("analysis") / "data" / "immune_programs.gmt"
        with resources.as_file(packaged) as path:
            return read(path, genes, min_size, max_size)
    if "/" in name or name.lower().endswith((".gmt", ".gz", ".txt")):
        raise InputError(f"there is no gene set file {name}: check the path.")
    return from_sets(_download(name, organism), genes, min_size, max_size, source=name)


def read(
    path: str | Path, genes: Sequence[str], min_size: int = 20, max_size: int = 500
) -> GeneSets:
    """Reads a GMT file, restricted to the measured genes.

    Empty fields are dropped, a gene listed twice in a set counts once, and weights as Enrichr
    writes them ("CD8A,1.0") are ignored. A set that stands in the file twice with the same genes is
    taken once; two different sets of one name are refused.

    Args:
        path: the file, plain or compressed by gzip (told by its content, not by its name).
        genes: names of the measured genes, each once. They are the universe.
        min_size, max_size: sets with fewer or more genes IN THE UNIVERSE are dropped.

    Returns:
        The sets; `names, membership = read(...)` takes the two most needed.

    Raises:
        InputError: if the file is missing or not GMT, if `genes` repeats a name, or if no set is
            left, with what both sides look like.
    """
    sets: dict[str, list[str]] = {}
    descriptions: dict[str, str] = {}
    for number, line in enumerate(_lines(Path(path)), start=1):
        if not line.strip():
            continue
        name, *fields = (field.strip() for field in line.split("\t"))
        if not fields or not name:
            raise InputError(
                f"{path}, line {number} is not GMT: {line[:60]!r} should be a set's name, a "
                "description and its genes, separated by tabs."
            )
        members = [_without_weight(field) for field in fields[1:] if field]
        if name in sets and set(sets[name]) != set(members):
            raise InputError(
                f"{path}, line {number}: the set {name!r} stands in the file twice with different "
                "genes: rename one of them."
            )
        sets.setdefault(name, members)
        descriptions.setdefault(name, fields[0])
    if not any(sets.values()):
        raise InputError(f"{path} holds no gene sets: is it the right file, and complete?")
    return from_sets(sets, genes, min_size, max_size, descriptions, source=str(path))


def from_sets(
    sets: Mapping[str, Iterable[str]],
    genes: Sequence[str],
    min_size: int = 20,
    max_size: int = 500,
    descriptions: Mapping[str, str] | None = None,
    source: str = "the gene sets",
) -> GeneSets:
    """Gene sets from a dictionary of names to genes; otherwise as `read`.

    Args:
        descriptions: of each set, optional.
        source: what an error message calls the sets.
    """
    if not 1 <= min_size <= max_size:
        raise InputError(
            f"min_size={min_size}, max_size={max_size}: give 1 <= min_size <= max_size."
        )
    column = _columns(genes)
    set_genes = {gene for members in sets.values() for gene in members}
    found = set_genes & column.keys()
    if not found:
        raise InputError(
            f"none of the {len(set_genes)} genes of {source} ({_some(set_genes)}) is among your "
            f"{len(column)} genes ({_some(column)}). " + (_hint(set_genes, set(column), 0) or SAME)
        )
    members = {name: {column[gene] for gene in sets[name] if gene in column} for name in sets}
    size = {name: len(columns) for name, columns in members.items()}
    kept = [name for name in sets if min_size <= size[name] <= max_size]
    if not kept:
        spread = np.percentile(list(size.values()), [0, 50, 100]).astype(int)
        raise InputError(
            f"none of the {len(sets)} sets of {source} has {min_size} to {max_size} of your "
            f"{len(column)} genes: they have {spread[0]} to {spread[2]}, median {spread[1]}; "
            f"{len(found)} of their {len(set_genes)} genes were measured. "
            + (_hint(set_genes, set(column), len(found)) or "Change min_size or max_size.")
        )
    indptr = np.cumsum([0] + [size[name] for name in kept])
    indices = np.concatenate([sorted(members[name]) for name in kept])
    ones = np.ones(indices.size)
    return GeneSets(
        names=kept,
        membership=sparse.csr_array((ones, indices, indptr), shape=(len(kept), len(column))),
        descriptions=[(descriptions or {}).get(name, "") for name in kept],
        coverage=Coverage(
            n_read=len(sets),
            n_kept=len(kept),
            too_small={name: n for name, n in size.items() if n < min_size},
            too_large={name: n for name, n in size.items() if n > max_size},
            n_set_genes=len(set_genes),
            n_found=len(found),
        ),
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"there is no gene set file {path}: check the path.")
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is a damaged gzip file ({error}): fetch it again.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file: give gene sets in GMT format.") from error
    if "\0" in text:
        raise InputError(f"{path} is not a text file: give gene sets in GMT format.")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _without_weight(field: str) -> str:
    """CD8A from CD8A,1.0; a comma before anything but a number belongs to the name."""
    name, comma, weight = field.rpartition(",")
    return name if comma and weight.replace(".", "", 1).isdigit() else field


def _download(name: str, organism: str) -> dict[str, list[str]]:
    # gseapy takes a second to import, which a file on disk does not need.
    import gseapy

    try:
        return gseapy.get_library(name, organism=organism, max_size=10**9)
    except (ValueError, OSError) as error:  # an unknown name; any trouble of the network
        raise InputError(
            f"{name!r} is neither a file nor {EMBEDDED!r}, and no Enrichr library of that name "
            f"could be had for {organism} ({type(error).__name__}: {str(error)[:80]}). Check the "
            "name and the network, or give the path of a GMT file."
        ) from error


def _columns(genes: Sequence[str]) -> dict[str, int]:
    """The position of each gene."""
    genes = list(genes)
    for position, gene in enumerate(genes):
        if not isinstance(gene, str):
            raise InputError(f"genes must be names, but gene {position} is {gene!r}.")
    column = {gene: position for position, gene in enumerate(genes)}
    if len(column) < len(genes):
        repeated = [gene for gene, n in Counter(genes).items() if n > 1]
        raise InputError(
            f"{len(repeated)} gene names occur more than once ({_some(repeated)}): make them "
            "unique, keeping one column or adding the columns up (never by a suffix)."
        )
    return column


def _some(names: Iterable[str]) -> str:
    return ", ".join(islice(sorted(names), 3))


def _hint(set_genes: set[str], genes: set[str], n_found: int) -> str:
    """What probably keeps two lists of gene names apart; empty if nothing tried helps much."""

    def mostly_ensembl(names: set[str]) -> bool:
        return 2 * sum(ENSEMBL.fullmatch(name) is not None for name in names) > len(names)

    if mostly_ensembl(genes) != mostly_ensembl(set_genes):
        which = "your genes" if mostly_ensembl(genes) else "the sets' genes"
        return f"Only {which} are Ensembl ids: use the same kind, as in adata.var['symbol']."
    n_unversioned = len({g.split(".")[0] for g in genes} & {g.split(".")[0] for g in set_genes})
    if mostly_ensembl(genes) and n_unversioned > 2 * n_found:
        return f"Without the version after the dot {n_unversioned} Ensembl ids would match."
    n_upper = len({g.upper() for g in genes} & {g.upper() for g in set_genes})
    if n_upper > 2 * n_found:
        return (
            f"In upper case {n_upper} would match: mouse against human symbols? Then upper-case "
            "your genes, or better, map orthologs."
        )
    return ""
