"""Gene sets from tables of pairs and from the Gene Ontology, before genes are matched.

Tables of (set, gene) pairs; the closure tables of actiobio, where each gene already stands at every
term that follows; and the ontology's own files, OBO and GAF, where it has to be worked out: a gene
of a term is one of every term that this term is, or is part of (the true-path rule).
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from analysis.gene_names import read_text
from sae_jax.errors import InputError
from sae_jax.reading import reading

# Evidence from experiments, of small and of high throughput.
EXPERIMENTAL = frozenset(
    {"EXP", "IDA", "IPI", "IMP", "IGI", "IEP", "HTP", "HDA", "HMP", "HGI", "HEP"}
)
RELATIONS = ("is_a", "part_of")
GO_ID = re.compile(r"GO:\d{7}")
_CLOSURE = ["source_id", "target_id", "type", "experimental"]


@dataclass(frozen=True)
class NamedSets:
    """Gene sets as they were read: the genes of each, descriptions, what was left out and why."""

    sets: Mapping[str, Iterable[str]]
    descriptions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Ontology:
    """The terms that are not obsolete, and what follows from each.

    names, namespaces: of each term.
    parents: the terms that a term is, or is part of, directly; every term comes before its parents.
    alternatives: the term that each secondary id stands for.
    subsets: the terms of each subset that the file defines, a slim for instance.
    """

    names: dict[str, str]
    namespaces: dict[str, str]
    parents: dict[str, tuple[str, ...]]
    alternatives: dict[str, str]
    subsets: dict[str, frozenset[str]] = field(default_factory=dict)

    @functools.cached_property
    def _by_name(self) -> dict[str, str]:
        return {name.lower(): term for term, name in self.names.items()}

    def identify(self, term: str) -> str | None:
        """The id of a term given by id, as "name (GO:0006955)", or by name; None if unknown."""
        found = GO_ID.search(term)
        key = term if found is None else found[0]
        if key in self.names:
            return key
        return self.alternatives.get(key, self._by_name.get(key.lower()))

    def ancestors(self, term: str) -> set[str]:
        """The ids above a term, the term itself not among them."""
        found, waiting = set(), list(self.parents[term])
        while waiting:
            parent = waiting.pop()
            if parent not in found:
                found.add(parent)
                waiting.extend(self.parents[parent])
        return found

    def first_level(self) -> set[str]:
        """The children of the roots: the level that colours Schuster's Figure 3A."""
        roots = {term for term, parents in self.parents.items() if not parents}
        return {term for term, parents in self.parents.items() if roots & set(parents)}

    def slim(self, subset: str = "goslim_generic") -> set[str]:
        """The terms of a subset, roots left out: they would say nothing."""
        if subset not in self.subsets:
            raise InputError(f"no subset {subset!r}: the file has {sorted(self.subsets)}.")
        return {term for term in self.subsets[subset] if self.parents[term]}

    def propagate(self, genes: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
        """The genes of each term and of all terms below it; terms without genes are left out."""
        reached = {term: set(members) for term, members in genes.items()}
        for term, parents in self.parents.items():
            for parent in parents:
                if term in reached:
                    reached.setdefault(parent, set()).update(reached[term])
        return reached


def read_obo(path: str | Path, relations: Collection[str] = RELATIONS) -> Ontology:
    """Reads an ontology such as go-basic.obo, plain or gzip.

    Args:
        path: the file.
        relations: along which genes are passed on. The regulation of a process is not the process:
            the relations that regulate are not among them.

    Raises:
        InputError: if the file is missing or no ontology, if a term has a parent that the file does
            not hold, or if terms are their own ancestors.
    """
    # They take half a second to import, which other sources do not need.
    import networkx
    import obonet

    text = read_text(path, "ontology", "an ontology in OBO format")
    with reading(path, "is not an ontology in OBO format"):
        graph = obonet.read_obo(io.StringIO(text))
    terms = {term: data for term, data in graph.nodes(data=True) if "name" in data}
    if not terms:
        raise InputError(f"{path} holds no terms: is it an ontology in OBO format, and complete?")
    edges = [(low, high) for low, high, kind in graph.edges(keys=True) if kind in relations]
    if strange := sorted({high for _, high in edges} - terms.keys()):
        raise InputError(
            f"{len(strange)} parents of terms in {path} are not in it, or obsolete "
            f"({', '.join(strange[:3])}): is the file complete?"
        )
    upward = networkx.DiGraph(edges)
    upward.add_nodes_from(terms)
    if not networkx.is_directed_acyclic_graph(upward):
        cycle = " -> ".join(low for low, _ in networkx.find_cycle(upward))
        raise InputError(f"terms of {path} are their own ancestors by {tuple(relations)}: {cycle}.")
    return Ontology(
        names={term: data["name"] for term, data in terms.items()},
        namespaces={term: data.get("namespace", "") for term, data in terms.items()},
        parents={term: tuple(upward[term]) for term in networkx.topological_sort(upward)},
        alternatives={other: t for t, data in terms.items() for other in data.get("alt_id", ())},
        subsets={
            name: frozenset(t for t, data in terms.items() if name in data.get("subset", ()))
            for name in sorted({name for data in terms.values() for name in data.get("subset", ())})
        },
    )


def gaf_sets(
    path: str | Path,
    obo: str | Path,
    evidence: Collection[str] | None = None,
    namespace: str | None = None,
    taxon: int | None = None,
    genes_by: str = "symbol",
    relations: Collection[str] = RELATIONS,
) -> NamedSets:
    """Gene sets of an ontology's terms from annotations, passed on to all terms that follow.

    Annotations that say NOT, that say there is no data (ND) or whose term is obsolete or unknown
    are left out and counted; secondary ids of terms are taken for the terms.

    Args:
        path: annotations in GAF format, plain or gzip.
        obo, relations: as in `read_obo`.
        evidence: the codes that count, for example `EXPERIMENTAL`; all if not given.
        namespace: only sets of "biological_process", "molecular_function" or "cellular_component".
            Genes still pass from functions to the processes they are part of, if the file says so.
        taxon: only genes of this species, by NCBI's number.
        genes_by: "symbol" (the third column) or "id" (the second: UniProt, MGI, ...).

    Returns:
        Sets named "T cell activation (GO:0042110)", described by the id.

    Raises:
        InputError: as `read_obo`; if it is not GAF; if no annotation or no term is left.
    """
    if genes_by not in ("symbol", "id"):
        raise InputError(f"genes_by={genes_by!r}: take 'symbol' or 'id'.")
    ontology = read_obo(obo, relations)
    left_out: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    direct: dict[str, set[str]] = {}
    lines = read_text(path, "annotation", "annotations in GAF format").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("!"):
            continue
        fields = line.split("\t")
        if len(fields) < 15:
            raise InputError(
                f"{path}, line {number} is not GAF: it has {len(fields)} columns, not 15 to 17."
            )
        term, code = ontology.alternatives.get(fields[4], fields[4]), fields[6]
        codes[code] += 1
        # Of two taxa the first is the gene's, the other that of a host or a guest.
        if taxon is not None and fields[12].split("|")[0] != f"taxon:{taxon}":
            left_out["of another taxon"] += 1
        elif "NOT" in fields[3].upper().split("|"):
            left_out["that say NOT"] += 1
        elif code == "ND" or (evidence is not None and code not in evidence):
            left_out["by their evidence"] += 1
        elif term not in ontology.names:
            left_out["of obsolete or unknown terms"] += 1
        else:
            gene = fields[2 if genes_by == "symbol" else 1].strip()
            direct.setdefault(term, set()).add(gene)
    notes = tuple(f"{n} annotations {why} left out" for why, n in left_out.items())
    if not direct:
        raise InputError(
            f"no annotation of {path} is left: {'; '.join(notes) or 'it has none'}. Its evidence "
            f"codes: {', '.join(sorted(codes)) or 'none'}."
        )
    reached = ontology.propagate(direct)
    kept = [term for term in reached if namespace in (None, ontology.namespaces[term])]
    if not kept:
        known = sorted(set(ontology.namespaces.values()))
        raise InputError(f"no term is of namespace {namespace!r}; {obo} has {known}.")
    return _by_name({term: reached[term] for term in sorted(kept)}, ontology.names, notes)


def closure_sets(
    path: str | Path,
    nodes: str | Path | None = None,
    only_direct: bool = False,
    only_experimental: bool = False,
) -> NamedSets:
    """Gene sets from a closure table: one row per gene and term, also those that are inferred.

    Args:
        path: a table with columns source_id (gene: Entrez), target_id (term), type ("direct" or
            "inferred") and experimental ("True" or "False").
        nodes: a table with columns identifier and name, to name the sets.
        only_direct: leave out what was inferred from the ontology.
        only_experimental: keep what rests on experiments. The inferred rows of actiobio never say
            so, which leaves direct rows only.

    Returns:
        Sets named "T cell activation (GO:0042110)" and described by the id, or named by the id.
    """
    table = read_table(path, _CLOSURE)
    for column, allowed in (("type", ("direct", "inferred")), ("experimental", ("True", "False"))):
        if strange := sorted(set(table[column]) - set(allowed)):
            raise InputError(f"{path}: {column} must be one of {allowed}, not {strange[:3]}.")
    keep = pd.Series(True, table.index)
    if only_direct:
        keep &= table["type"] == "direct"
    if only_experimental:
        keep &= table["experimental"] == "True"
    if not keep.any():
        raise InputError(f"none of the {len(keep)} rows of {path} is of the kind asked for.")
    names: Mapping[str, str] = {}
    if nodes is not None:
        named = read_table(nodes, ["identifier", "name"])
        names = dict(zip(named["identifier"], named["name"], strict=True))
    left_out = len(keep) - int(keep.sum())
    notes = (f"{left_out} of {len(keep)} rows left out as not asked for",) if left_out else ()
    sets = table[keep].groupby("target_id")["source_id"].unique().to_dict()
    return _by_name(sets, names, notes)


def pair_sets(path: str | Path, source: str = "source", target: str = "target") -> NamedSets:
    """Gene sets from a table of pairs, as decoupler's nets are.

    Weights and signs are ignored: a gene belongs to a set or not. A pair that stands in the table
    twice counts once.

    Args:
        path: a table as in `read_table`.
        source, target: the columns that name the set and the gene.
    """
    if source == target:
        raise InputError(f"source and target are both {source!r}: name the sets and the genes.")
    table = read_table(path, [source, target])
    return NamedSets(table.groupby(source, sort=False)[target].unique().to_dict())


def read_table(path: str | Path, columns: list[str]) -> pd.DataFrame:
    """The named columns of a CSV, TSV (both plain or gzip) or parquet file, as text.

    Raises:
        InputError: if it is missing, damaged or no table, if it lacks a column, or has empty fields
            in one.
    """
    found = columns_of(path)
    if missing := [name for name in columns if name not in found]:
        raise InputError(f"{path} has no column {' or '.join(missing)}, but {found[:8]}.")
    with reading(path, "cannot be read as a table"):
        if _is_parquet(path):
            table = pd.read_parquet(path, columns=columns)
            table = table.astype(object).where(table.notna(), "").astype(str)
        else:
            # A gene may be called NA or NaN.
            text = io.StringIO(_text(path))
            table = pd.read_csv(text, sep=_separator(path), dtype=str, na_filter=False)[columns]
    if table.empty:
        raise InputError(f"{path} has no rows: is it the right file, and complete?")
    table = table.apply(lambda column: column.str.strip())
    empty = (table == "").any(axis=1).to_numpy()
    if empty.any():
        raise InputError(
            f"{path}: {empty.sum()} rows have an empty field in {columns}, the first of them row "
            f"{empty.argmax() + 1}: complete or remove them."
        )
    return table


def columns_of(path: str | Path) -> list[str]:
    """The names of the columns of a CSV, TSV or parquet file."""
    if not _is_parquet(path):
        return next(csv.reader([_text(path).partition("\n")[0]], delimiter=_separator(path)), [])
    if not Path(path).is_file():
        raise InputError(f"there is no gene set file {path}: check the path.")
    with reading(path, "is not a parquet file"):
        return pq.read_schema(path).names


def is_closure(columns: Collection[str]) -> bool:
    """Whether a table with these columns is a closure table."""
    return set(_CLOSURE) <= set(columns)


def _is_parquet(path: str | Path) -> bool:
    return str(path).lower().endswith(".parquet")


def _separator(path: str | Path) -> str:
    return "\t" if str(path).lower().removesuffix(".gz").endswith(".tsv") else ","


def _text(path: str | Path) -> str:
    return read_text(path, "gene set", "a CSV, TSV or parquet table")


def _by_name(
    sets: Mapping[str, Iterable[str]], names: Mapping[str, str], notes: tuple[str, ...]
) -> NamedSets:
    label = {term: f"{names[term]} ({term})" if term in names else term for term in sets}
    return NamedSets(
        {label[term]: genes for term, genes in sets.items()},
        {label[term]: term for term in sets},
        notes,
    )
