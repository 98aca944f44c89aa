"""Gene sets as a sparse 0/1 matrix over the genes that were measured.

Sets come from a GMT file (plain or gzip: name, description, genes, separated by tabs), from the
programs packaged with this library, from a table, from annotations of an ontology, or from an
online collection. Genes are matched by name; through a gene table also by their other names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from analysis import gene_names, ontology
from analysis.gene_names import GeneTable, why_apart
from analysis.ontology import NamedSets
from sae_jax.errors import InputError

EMBEDDED = "embedded"
TABLES = (".csv", ".tsv", ".parquet")
MIN_UNIVERSE = 100
SAME = "Are both of the same species and kind (symbols, Ensembl or Entrez ids)?"


@dataclass(frozen=True)
class Coverage:
    """What became of the sets that were read.

    n_read, n_kept: sets in the file, and sets in the result.
    too_small, too_large: the dropped sets, each with the number of its genes that were measured.
    n_set_genes, n_found: different genes in all sets read, and how many of them were measured.
    notes: what was left out in reading, and how names were understood through a gene table.
    """

    n_read: int
    n_kept: int
    too_small: dict[str, int]
    too_large: dict[str, int]
    n_set_genes: int
    n_found: int
    notes: tuple[str, ...] = ()

    @property
    def share_found(self) -> float:
        """Share of the sets' genes that were measured, from 0 to 1."""
        return self.n_found / self.n_set_genes

    def __str__(self) -> str:
        counts = (
            f"{self.n_kept} of {self.n_read} gene sets kept ({len(self.too_small)} too small, "
            f"{len(self.too_large)} too large); {self.n_found} of {self.n_set_genes} of their "
            f"genes measured ({self.share_found:.0%})"
        )
        return "; ".join((counts, *self.notes))


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
    *,
    gene_table: GeneTable | str | Path | None = None,
    naming: str | None = None,
    min_universe: int | None = None,
    **options: Any,
) -> GeneSets:
    """Reads gene sets from wherever they are.

    Args:
        name_or_path: a GMT file; or a table (.csv, .tsv, .parquet) of sets and genes or of a
            closure; or annotations (.gaf) with the ontology as `obo`; all but parquet also as .gz;
            or "embedded" for the immune programs packaged with this library, some of them of fewer
            than 20 genes; or the name of an Enrichr library ("GO_Biological_Process_2021"), which
            is downloaded.
        genes, min_size, max_size: as in `read`.
        organism: of an Enrichr library: Human, Mouse, Yeast, Fly, Fish or Worm.
        gene_table, naming: as in `from_sets`; or the path of a human gene_info.
        min_universe: refuse fewer genes than these. Of tables and annotations 100 if not given; of
            the rest, which panels of a few genes are compared with too, none.
        options: of tables and annotations, as in `ontology.pair_sets`, `closure_sets`, `gaf_sets`.

    Raises:
        InputError: as `read`; or if it is no file and cannot be downloaded, or genes are too few.
    """
    kind = _kind(name_or_path)
    if min_universe is None:
        min_universe = MIN_UNIVERSE if kind in (*TABLES, ".gaf") else 0
    if len(genes) < min_universe:
        raise InputError(
            f"there are {len(genes)} genes, fewer than {min_universe}: a set is compared with all "
            "other measured genes, so give these too, not a selection (or lower min_universe)."
        )
    if isinstance(gene_table, str | Path):
        gene_table = gene_names.read(gene_table)
    found = _find(name_or_path, kind, organism, options)
    return from_sets(
        found.sets, genes, min_size, max_size, found.descriptions, str(name_or_path),
        gene_table=gene_table, naming=naming, notes=found.notes,
    )  # fmt: skip


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
    found = _gmt(path)
    return from_sets(found.sets, genes, min_size, max_size, found.descriptions, str(path))


def from_sets(
    sets: Mapping[str, Iterable[str]],
    genes: Sequence[str],
    min_size: int = 20,
    max_size: int = 500,
    descriptions: Mapping[str, str] | None = None,
    source: str = "the gene sets",
    *,
    gene_table: GeneTable | None = None,
    naming: str | None = None,
    notes: Sequence[str] = (),
) -> GeneSets:
    """Gene sets from a dictionary of names to genes; otherwise as `read`.

    With a gene table two names match if they are of one gene; a name that the table does not know,
    or that several genes share, matches only itself. Where several of `genes` are one gene, a set
    has the one whose name is current, or else the first in the alphabet, so that none counts twice.

    Args:
        descriptions: of each set, optional.
        source: what an error message calls the sets.
        gene_table: brings sets and genes of different naming together.
        naming: of `genes`, "symbol", "ensembl" or "entrez"; told from each name if not given.
        notes: for the coverage.
    """
    if not 1 <= min_size <= max_size:
        raise InputError(
            f"min_size={min_size}, max_size={max_size}: give 1 <= min_size <= max_size."
        )
    if naming is not None and gene_table is None:
        raise InputError(f"naming={naming!r} needs a gene table, to know other names by.")
    column = _columns(genes)
    n_genes = len(column)
    theirs = set_genes = {gene for members in sets.values() for gene in members}
    understood: tuple[str, ...] = ()
    if gene_table is not None:
        key, column, understood = _by_gene(theirs, column, gene_table, naming)
        sets = {name: {key[gene] for gene in members} for name, members in sets.items()}
        set_genes = set(key.values())
    found = set_genes & column.keys()
    if not found:
        hint = ". ".join((*understood, SAME)) if understood else why_apart(set_genes, set(column))
        raise InputError(
            f"none of the {len(set_genes)} genes of {source} ({_some(theirs)}) is among your "
            f"{n_genes} genes ({_some(genes)}). " + (hint or SAME)
        )
    members = {name: {column[gene] for gene in sets[name] if gene in column} for name in sets}
    size = {name: len(columns) for name, columns in members.items()}
    kept = [name for name in sets if min_size <= size[name] <= max_size]
    if not kept:
        spread = np.percentile(list(size.values()), [0, 50, 100]).astype(int)
        raise InputError(
            f"none of the {len(sets)} sets of {source} has {min_size} to {max_size} of your "
            f"{n_genes} genes: they have {spread[0]} to {spread[2]}, median {spread[1]}; "
            f"{len(found)} of their {len(set_genes)} genes were measured. "
            + (why_apart(set_genes, set(column), len(found)) or "Change min_size or max_size.")
        )
    indptr = np.cumsum([0] + [size[name] for name in kept])
    indices = np.concatenate([sorted(members[name]) for name in kept])
    ones = np.ones(indices.size)
    return GeneSets(
        names=kept,
        membership=sparse.csr_array((ones, indices, indptr), shape=(len(kept), n_genes)),
        descriptions=[(descriptions or {}).get(name, "") for name in kept],
        coverage=Coverage(
            n_read=len(sets),
            n_kept=len(kept),
            too_small={name: n for name, n in size.items() if n < min_size},
            too_large={name: n for name, n in size.items() if n > max_size},
            n_set_genes=len(set_genes),
            n_found=len(found),
            notes=(*notes, *understood),
        ),
    )


def _kind(name_or_path: str | Path) -> str:
    """Which of the sources that options belong to: the ending of a file, without .gz, or none."""
    ending = Path(str(name_or_path).lower().removesuffix(".gz")).suffix
    return ending if ending in (*TABLES, ".gaf", ".obo") else ""


def _find(
    name_or_path: str | Path, kind: str, organism: str, options: Mapping[str, Any]
) -> NamedSets:
    """The sets as they were read, from where `load` is told to look."""
    name = str(name_or_path)
    if kind == ".obo":
        raise InputError(f"{name} has terms without genes: give annotations (.gaf), it as obo=.")
    if kind == ".gaf":
        if "obo" not in options:
            raise InputError(f"{name} needs the ontology that its terms are of: give obo=.")
        return ontology.gaf_sets(name, **options)
    if kind:
        closure = ontology.is_closure(ontology.columns_of(name))
        return (ontology.closure_sets if closure else ontology.pair_sets)(name, **options)
    if options:
        raise InputError(f"{name} takes no {', '.join(options)}: tables and annotations do.")
    if Path(name).is_file():
        return _gmt(name)
    if name == EMBEDDED:
        packaged = resources.files("analysis") / "data" / "immune_programs.gmt"
        with resources.as_file(packaged) as path:
            return _gmt(path)
    if "/" in name or name.lower().endswith((".gmt", ".gz", ".txt")):
        raise InputError(f"there is no gene set file {name}: check the path.")
    return NamedSets(_download(name, organism))


def _gmt(path: str | Path) -> NamedSets:
    sets: dict[str, list[str]] = {}
    descriptions: dict[str, str] = {}
    lines = gene_names.read_text(path, "gene set", "gene sets in GMT format").split("\n")
    for number, line in enumerate(lines, start=1):
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
    return NamedSets(sets, descriptions)


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


def _by_gene(
    theirs: set[str], column: Mapping[str, int], table: GeneTable, naming: str | None
) -> tuple[dict[str, str], dict[str, int], tuple[str, ...]]:
    """The gene behind each name of the sets, the column of each gene, and what was understood.

    A gene is its Entrez id or, where the table has none for a name, the name.
    """
    names = sorted(theirs)
    genes, report = table.map(names, "entrez")
    key = {name: gene or name for name, gene in zip(names, genes, strict=True)}
    genes, our_report = table.map(column, "entrez", naming)
    by_gene: dict[str, int] = {}
    # "current" comes before "synonym"; ambiguous and unknown names share their gene with no other.
    for _, name, gene in sorted(zip(our_report.how, column, genes, strict=True)):
        by_gene.setdefault(gene or name, column[name])
    return key, by_gene, (f"your genes: {our_report}", f"the sets' genes: {report}")


def _columns(genes: Sequence[str]) -> dict[str, int]:
    """The position of each gene."""
    genes = list(genes)
    for position, gene in enumerate(genes):
        if not isinstance(gene, str) or not gene.strip():
            raise InputError(f"genes must be names, but gene {position} is {gene!r}.")
    if genes == [str(position) for position in range(len(genes))]:
        raise InputError(
            f"the genes have no names, only the numbers 0 to {len(genes) - 1}: give their symbols, "
            "Ensembl or Entrez ids."
        )
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
