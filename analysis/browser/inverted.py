"""What the index knows of genes and terms: the long tables of a run, seen from their other side.

span.<folder>.<table>   of each feature its first row in a long table and the one after its last
driven.*                gene -> features that it drives: indptr, feature, value, rank
differing.*             gene -> features whose cells it differs in: ..., t, log2_fold_change; its
                        rank is among the genes that rise, or among those that fall
named.*                 feature and term of each naming, rising; side, log10_q, auc, nes, by
sets.*, gene_terms.*    term -> its genes, gene -> its terms
deletion.*              feature -> points of curves: indptr, kind, order, n_genes, activation
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from analysis import gene_names
from analysis.browser.columns import SIGNIFICANT
from analysis.browser.folder import Folder, reading
from analysis.browser.index import Writer
from analysis.browser.rows import Rows, coded, numbered
from sae_jax import InputError, files

# Of each long table the columns that it must have.
LONG = {
    "enrichment": ("term", "auc"),
    "top_terms": ("term", "side", "rank", "size", "hits", "auc", "log10_p", "log10_q", "named"),
    "genes": ("gene", "t", "log2_fold_change", "log10_p"),
    "dge": ("gene", "t", "log2_fold_change", "log10_p"),
    "attribution": ("gene", "attribution"),
    "samples": ("prototype", "counterfactual", "gene", "attribution"),
    "gsea_attribution": ("term", "es", "nes", "p", "q"),
    "gsea_dge": ("term", "es", "nes", "p", "q"),
}
# Genes of a feature that a gene's page knows of; of those that differ so many up, so many down.
MOST_DRIVING, MOST_DIFFERING = 500, 50
CURVES = ("deletion", "deletion_held_out")
BY = ("enrichment", "attribution", "dge")
NAMING = ("change", "matched", "fisher")  # the lens ranks terms by the first of these it made
LEAST_P = 1e-320
_CARRYING = ("GeneID", "Symbol", "Synonyms", "dbXrefs", "Symbol_from_nomenclature_authority")


def write(
    writer: Writer,
    opened: Sequence[Folder],
    numbers: Sequence[Mapping[str, int]],
    n_features: int,
    gene_info: Path | None,
) -> dict[str, Any]:
    """All of the above.

    Args:
      opened: folders. numbers: of each, the number in the run of each of its features by name.
      gene_info: NCBI's table, for other names of the genes.

    Returns:
      For meta.json: genes, gene_info, terms, sizes of terms, tables (their names, by folder),
      has_sets, curves (of each file the names of kinds and orders).
    """
    tables: list[dict[str, Rows]] = []
    for i, (folder, own) in enumerate(zip(opened, numbers, strict=True)):
        tables.append({})
        for name, columns in LONG.items():
            if (path := folder.path / f"{name}.parquet").exists():
                rows = Rows(path)
                rows.require("feature", *columns)
                rows.find(own, n_features)
                writer.save(f"span.{i}.{name}", rows.span)
                tables[i][name] = rows
    sets = {i: Rows(path) for i, folder in enumerate(opened)
            if (path := folder.path / "gene_sets.parquet").exists()}  # fmt: skip
    for table in sets.values():
        table.require("term", "gene")
    every = [rows for some in tables for rows in some.values()]
    genes = _names([*every, *sets.values()], "gene")
    terms = _names([*every, *sets.values()], "term")
    size = _write_sets(writer, sets, genes, terms)
    _term_sizes(size, every, terms)
    _write_driven(writer, tables, genes, n_features)
    _write_differing(writer, tables, genes, n_features)
    _write_named(writer, opened, tables, numbers, terms, n_features)
    info = None if gene_info is None else _gene_info(writer, gene_info, list(genes))
    return {
        "genes": list(genes), "gene_info": info, "terms": list(terms), "sizes": size.tolist(),
        "tables": [list(some) for some in tables], "has_sets": bool(sets),
        "curves": {
            name: _write_deletion(writer, opened, numbers, n_features, name) for name in CURVES
        },
    }  # fmt: skip


def _names(tables: Sequence[Rows], column: str) -> dict[str, int]:
    """The numbers of all names in a column of tables, in the order of their occurrence."""
    found: dict[str, int] = {}
    for rows in tables:
        if column in rows.columns:
            for _, part in rows.batches([column]):
                with reading(rows.path):
                    codes, values = coded(part[column])
                for code in pd.unique(codes):
                    found.setdefault(values[code], len(found))
    return found


def _write_sets(
    writer: Writer,
    sets: Mapping[int, Rows],
    genes: Mapping[str, int],
    terms: Mapping[str, int],
) -> np.ndarray:
    """Membership by each folder, as it tested it, and by all, both ways; sizes of the terms, -1
    where not known."""
    shape = (len(terms), len(genes))
    member = sparse.csr_array(shape, dtype=bool)
    for i, rows in sets.items():
        own = sparse.csr_array(shape, dtype=bool)
        for _, part in rows.batches(["term", "gene"]):
            with reading(rows.path):
                pair = (numbered(part["term"], terms), numbered(part["gene"], genes))
            own = own + sparse.csr_array((np.ones(len(pair[0]), bool), pair), shape=shape)
        _write_matrix(writer, f"sets.{i}", own)
        member = member + own
    _write_matrix(writer, "sets", member)
    _write_matrix(writer, "gene_terms", member.T.tocsr())
    size = np.diff(member.indptr)
    return np.where(size > 0, size, -1)


def _write_matrix(writer: Writer, name: str, matrix: sparse.csr_array) -> None:
    matrix.sort_indices()
    writer.save(f"{name}.indptr", matrix.indptr.astype(np.int64))
    writer.save(f"{name}.indices", matrix.indices.astype(np.uint32))


def _term_sizes(size: np.ndarray, tables: Sequence[Rows], terms: Mapping[str, int]) -> None:
    """Fill the sizes that gene sets do not tell from tables that do."""
    for rows in tables:
        if "size" not in rows.columns or (size >= 0).all():
            continue
        for _, part in rows.batches(["term", "size"]):
            with reading(rows.path):
                term, told = numbered(part["term"], terms), part["size"].to_numpy()
                unknown = size[term] < 0
                size[term[unknown]] = told[unknown]
            if (size >= 0).all():
                break


def _inverted(
    writer: Writer, name: str, parts: list[dict[str, np.ndarray]], n: int, by: str = "gene"
) -> None:
    """Write entries by what they are `by`, kept in their order within it."""
    held = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.argsort(held[by], kind="stable")
    count = np.bincount(held.pop(by), minlength=n)
    writer.save(f"{name}.indptr", np.concatenate([[0], np.cumsum(count)]).astype(np.int64))
    for key, values in held.items():
        writer.save(f"{name}.{key}", values[order])


def _ranks(feature: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Places, from 1, of falling scores within each feature; features lie together."""
    order = np.lexsort((-score, feature))
    first = np.searchsorted(feature[order], feature[order], "left")
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order)) - first + 1
    return rank


def _write_driven(
    writer: Writer, tables: list[dict[str, Rows]], genes: Mapping[str, int], n_features: int
) -> None:
    found = [{"gene": np.empty(0, np.int32), "feature": np.empty(0, np.int32),
              "value": np.empty(0, np.float32), "rank": np.empty(0, np.int32)}]  # fmt: skip

    def keep(feature: np.ndarray, gene: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        value = columns["attribution"]
        rank = _ranks(feature, np.nan_to_num(value, nan=-np.inf))
        ours = (value > 0) & (rank <= MOST_DRIVING)
        found.append({"gene": gene[ours], "feature": feature[ours],
                      "value": value[ours].astype(np.float32), "rank": rank[ours]})  # fmt: skip

    sources = [some["attribution"] for some in tables if "attribution" in some]
    _each_once(sources, ("attribution",), genes, n_features, keep)
    _inverted(writer, "driven", found, len(genes))


def _write_differing(
    writer: Writer, tables: list[dict[str, Rows]], genes: Mapping[str, int], n_features: int
) -> None:
    found = [{"gene": np.empty(0, np.int32), "feature": np.empty(0, np.int32),
              "t": np.empty(0, np.float32), "log2_fold_change": np.empty(0, np.float32),
              "rank": np.empty(0, np.int32)}]  # fmt: skip

    def keep(feature: np.ndarray, gene: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        t = np.nan_to_num(columns["t"])
        rank = np.where(t > 0, _ranks(feature, t), _ranks(feature, -t))
        ours = (t != 0) & (rank <= MOST_DIFFERING)
        values = {key: held[ours].astype(np.float32) for key, held in columns.items()}
        found.append({"gene": gene[ours], "feature": feature[ours], **values, "rank": rank[ours]})

    sources = [some[name] for name in ("dge", "genes") for some in tables if name in some]
    _each_once(sources, ("t", "log2_fold_change"), genes, n_features, keep)
    _inverted(writer, "differing", found, len(genes))


def _each_once(
    sources: Sequence[Rows],
    columns: Sequence[str],
    genes: Mapping[str, int],
    n_features: int,
    keep: Callable[[np.ndarray, np.ndarray, dict[str, np.ndarray]], None],
) -> None:
    """Give `keep` the rows of every feature, of the first source that has any."""
    done = np.zeros(n_features, bool)
    for rows in sources:
        own = np.zeros(n_features, bool)
        for feature, part in rows.by_features(["gene", *columns]):
            with reading(rows.path):
                fresh = ~done[feature]
                held = {name: part[name].to_numpy().astype(np.float64)[fresh] for name in columns}
                keep(feature[fresh], numbered(part["gene"], genes)[fresh], held)
            own[feature] = True
        done |= own


def _write_named(
    writer: Writer,
    opened: Sequence[Folder],
    tables: list[dict[str, Rows]],
    numbers: Sequence[Mapping[str, int]],
    terms: Mapping[str, int],
    n_features: int,
) -> None:
    """Namings by the lens' enrichment and by GSEA at q <= .05."""
    empty = {"feature": np.int32, "term": np.int32, "log10_q": np.float32, "auc": np.float32,
             "nes": np.float32, "side": np.int8, "by": np.uint8}  # fmt: skip
    found = [{key: np.empty(0, dtype) for key, dtype in empty.items()}]

    def keep(ours: np.ndarray, by: int, **values: np.ndarray) -> None:
        n = int(np.count_nonzero(ours))
        values = {key: held[ours] for key, held in values.items()}
        values |= {key: np.full(n, np.nan) for key in ("auc", "nes") if key not in values}
        values["by"] = np.full(n, by)
        found.append({key: values[key].astype(dtype) for key, dtype in empty.items()})

    for folder, own, some in zip(opened, numbers, tables, strict=True):
        matrix = _named_matrix(folder, own, terms, n_features)
        if "enrichment" in some and matrix is not None:
            _of_enrichment(some["enrichment"], matrix, terms, keep)
        elif "top_terms" in some:
            rows = some["top_terms"]
            for feature, part in rows.by_features(["term", "side", "named", "log10_q", "auc"]):
                with reading(rows.path):
                    side = numbered(part["side"], {"up": 1, "down": -1})
                    values = {key: part[key].to_numpy() for key in ("log10_q", "auc")}
                    keep(part["named"].to_numpy().astype(bool), 0, feature=feature, side=side,
                         term=numbered(part["term"], terms), **values)  # fmt: skip
        elif "enrichment" in some and "best_term" in folder.table:
            _of_quickstart(some["enrichment"], folder, own, terms, keep)
        for by, name in enumerate(("gsea_attribution", "gsea_dge"), start=1):
            if name not in some:
                continue
            for feature, part in some[name].by_features(["term", "nes", "q"]):
                with reading(some[name].path):
                    q, nes = part["q"].to_numpy(), part["nes"].to_numpy()
                    log10_q = -np.log10(np.maximum(q, LEAST_P))
                    keep(q <= SIGNIFICANT, by, feature=feature, nes=nes, log10_q=log10_q,
                         term=numbered(part["term"], terms), side=np.sign(nes))  # fmt: skip
    held = {key: np.concatenate([part[key] for part in found]) for key in empty}
    order = np.lexsort((held["by"], held["term"], held["feature"]))
    for key, values in held.items():
        writer.save(f"named.{key}", values[order])


def _named_matrix(
    folder: Folder, own: Mapping[str, int], terms: Mapping[str, int], n_features: int
) -> sparse.csr_array | None:
    """Which term names which feature of the run, where the lens left it whole."""
    if not (path := folder.path / "named.npz").exists():
        return None
    with reading(path), np.load(path) as stored:
        if len(stored["indptr"]) != len(folder.table) + 1:
            raise ValueError("it is of other features")
        feature = np.repeat([own[name] for name in folder.table.index], np.diff(stored["indptr"]))
        term = np.asarray([terms.get(name, -1) for name in stored["terms"].tolist()], np.int64)
        ones = (np.ones(len(feature), bool), (feature, term[stored["indices"]]))
        return sparse.csr_array(ones, shape=(n_features, len(terms)))


def _of_enrichment(
    rows: Rows, matrix: sparse.csr_array, terms: Mapping[str, int], keep: Callable[..., None]
) -> None:
    """q, AUC and side of the namings, out of the long table."""
    if (told := naming_test(rows.columns)) is None:
        return
    test = f"log10_q_{told}"
    side = "change" if "change" in rows.columns else "z"
    rows.require(side)
    pairs = matrix.tocoo()
    wanted = np.sort(pairs.row.astype(np.int64) * len(terms) + pairs.col)
    for feature, part in rows.by_features(["term", "auc", side, test]):
        with reading(rows.path):
            term = numbered(part["term"], terms)
            ours = np.isin(feature.astype(np.int64) * len(terms) + term, wanted)
            keep(ours, 0, feature=feature, term=term, log10_q=part[test].to_numpy(),
                 auc=part["auc"].to_numpy(), side=np.sign(part[side].to_numpy()))  # fmt: skip


def naming_test(columns: Sequence[str]) -> str | None:
    """The test by which terms of a long table are ranked."""
    return next((test for test in NAMING if f"log10_q_{test}" in columns), None)


def _of_quickstart(
    rows: Rows, folder: Folder, own: Mapping[str, int], terms: Mapping[str, int],
    keep: Callable[..., None],
) -> None:  # fmt: skip
    """Of the features that a term names, all terms up at the q of the only test that names."""
    if (test := naming_test(rows.columns)) is None:
        return
    there = folder.table.index[folder.table["best_term"].notna()]
    testable = np.asarray([own[name] for name in there], np.int64)
    for feature, part in rows.by_features(["term", "auc", f"log10_q_{test}"]):
        with reading(rows.path):
            log10_q = part[f"log10_q_{test}"].to_numpy()
            ours = (log10_q >= -np.log10(SIGNIFICANT)) & np.isin(feature, testable)
            keep(ours, 0, feature=feature, term=numbered(part["term"], terms), log10_q=log10_q,
                 auc=part["auc"].to_numpy(), side=np.ones(len(feature)))  # fmt: skip


def _write_deletion(
    writer: Writer,
    opened: Sequence[Folder],
    numbers: Sequence[Mapping[str, int]],
    n_features: int,
    name: str,
) -> dict[str, list[str]] | None:
    """Points of the curves in a file by feature; the names of their kinds and orders."""
    for folder, own in zip(opened, numbers, strict=True):
        path = folder.path / f"{name}.parquet"
        if not path.exists():
            continue
        with reading(path):
            table = files.read_parquet(path)
            concepts = folder.table[folder.table["kind"] == "concept"]
            of = {latent: own[name] for name, latent in concepts["latent"].items()}
            kinds, orders = (table[key].astype("category").cat for key in ("kind", "order"))
            part = {
                "feature": np.asarray([of[latent] for latent in table["concept"]], np.int64),
                "kind": kinds.codes.to_numpy(np.uint8), "order": orders.codes.to_numpy(np.uint8),
                "n_genes": table["n_genes"].to_numpy(np.float32),
                "activation": table["activation"].to_numpy(np.float32),
            }  # fmt: skip
        _inverted(writer, name, [part], n_features, by="feature")
        return {"kinds": list(kinds.categories), "orders": list(orders.categories)}
    return None


def _gene_info(writer: Writer, path: Path, genes: list[str]) -> list[list[Any] | None]:
    """Of each gene NCBI's number, symbol, Ensembl id, description and aliases; None of those that
    it does not know as one gene."""
    with reading(path):
        lines, descriptions = _lines_with(path, set(genes))
    some = writer.path / "gene_info"
    with writer.writing():
        some.write_text("".join(lines), encoding="utf-8")
    try:
        table = gene_names.read(some)
    except InputError as error:
        raise InputError(str(error).replace(str(some), str(path))) from None
    with writer.writing():
        some.unlink()
    entrez = table.map(genes, to="entrez")[0] if genes else []
    aliases: dict[str, list[str]] = {}
    for alias, carriers in table.synonyms.items():
        for number in carriers:
            aliases.setdefault(number, []).append(alias)
    return [
        None if number is None else [
            number, table.symbol[number], table.ensembl.get(number), descriptions.get(number),
            sorted(aliases.get(number, ())),
        ]
        for number in entrez
    ]  # fmt: skip


def _lines_with(path: Path, names: set[str]) -> tuple[list[str], dict[str, str]]:
    """The lines of a gene_info whose genes carry one of some names: all that decides what these
    mean, at a tenth of the memory. And their descriptions by NCBI's number."""
    names = names | {name.split(".")[0] for name in names}
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    kept, descriptions = [], {}
    opener = gzip.open if packed else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:
        head = next(lines, "")
        kept.append(head)
        place = {name: i for i, name in enumerate(head.rstrip("\n").split("\t"))}
        told = place.get("description")
        used = [place[name] for name in _CARRYING if name in place]
        for number, line in enumerate(lines):
            fields = line.rstrip("\n").split("\t")
            carried = {
                name.removeprefix("Ensembl:")
                for i in used if i < len(fields) for name in fields[i].split("|")
            }  # fmt: skip
            if number == 0 or not carried.isdisjoint(names):  # the first: of which species it is
                kept.append(line)
                if told is not None and fields[told : told + 1] not in ([], ["-"]):
                    descriptions[fields[place["GeneID"]]] = fields[told]
    return kept, descriptions
