"""A run as the browser sees it: one folder, or several of the same cells and dictionary."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import logging
from scipy import sparse

from analysis import gene_names
from analysis.browser import absent, columns, index, inverted
from analysis.browser.columns import Column
from analysis.browser.folder import READ, Folder, reading
from analysis.browser.index import Index, Texts
from analysis.browser.rows import Rows
from sae_jax import InputError, files


class Run:
    """Everything that pages are made of. Nothing of the run's folders is ever written.

    Attributes:
      folders: as they were given. index: arrays on disk.
      features: one row a feature (index: names), standard columns first; see `columns.STANDARD`.
      columns: what its columns are, the names' first.
      genes, terms: names. sizes: genes of each term, -1 where not known.
      metadata: of each column of the cells that is shown, its number in the index and what it is.
      identifiers: those whose values name cells.
      maps: names of the cells' maps and their ranges.
      fingerprint: of the contents of the folders' files.
    """

    PANELS = tuple(absent.RUN)

    def __init__(
        self,
        folders: Sequence[Folder],
        made: Index,
        fingerprint: str,
        shown: Sequence[str] | None = None,
    ) -> None:
        self.folders, self.index, self.fingerprint = tuple(folders), made, fingerprint
        self.memo: dict[str, Any] = {}  # what search and table have worked out
        meta = made.meta
        self.genes: list[str] = meta["genes"]
        self.terms: list[str] = meta["terms"]
        self.sizes: list[int] = meta["sizes"]
        self.n_cells: int = meta["n_cells"]
        names = [held["name"] for held in meta["columns"]]
        if unknown := [name for name in shown or () if name not in names]:
            raise InputError(
                f"the cells have no column {', '.join(unknown)}; there are {', '.join(names)}"
            )
        hidden = set() if shown is None else set(names) - set(shown)
        told = [(i, held) for i, held in enumerate(meta["columns"]) if held["name"] not in hidden]
        self.metadata = [(i, held) for i, held in told if held["kind"] != "name"]
        self.identifiers = [(i, held) for i, held in told if held["kind"] == "name"]
        self.maps: list[dict[str, Any]] = meta["maps"]
        self.names, self._numbers = _union(folders)
        places = [np.asarray([own[name] for name in folder.table.index], np.int64)
                  for folder, own in zip(folders, self._numbers, strict=True)]  # fmt: skip
        table = columns.merged(
            [columns.standard(folder, hidden) for folder in folders], places, len(self.names)
        )
        self.features = self._completed(table).set_axis(pd.Index(self.names, name="feature"))
        self.columns: list[Column] = columns.describe(self.features)
        self._tables = [
            {name: Rows(folder.path / f"{name}.parquet", made[f"span.{i}.{name}"])
             for name in meta["tables"][i]}
            for i, folder in enumerate(folders)
        ]  # fmt: skip

    @classmethod
    def open(
        cls,
        folders: Sequence[str | Path],
        state: str | Path,
        gene_info: str | Path | None = None,
        columns: Sequence[str] | None = None,
    ) -> Run:
        """Opens run folders, and makes the index of them unless it is there.

        Args:
          folders: of `sae-jax lens`, `concepts` or `quickstart`; several where they are of the same
            cells and the same dictionary.
          state: a folder of the browser's own, for the index.
          gene_info: NCBI's gene_info, for other names and descriptions of genes.
          columns: of the cells' metadata that are shown; nothing is told of others, nor of what a
            program found out about them. None: all.

        Raises:
          InputError: folders that are damaged, of other programs, or do not belong together; a
            state that cannot be written; columns that are not there.
        """
        if not folders:
            raise InputError("no run folder is given: name at least one.")
        opened = [Folder.open(path) for path in folders]
        _check_together(opened)
        gene_info = None if gene_info is None else Path(gene_info)
        fingerprint = _fingerprint([folder.path for folder in opened])
        told = "none" if gene_info is None else _sha256(gene_info)
        parts = (fingerprint, told, index.VERSION)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()

        def make(path: Path) -> None:
            logging.info("making an index of the run, once: seconds to a minute")
            names, numbers = _union(opened)
            writer = index.Writer(path)
            n, taken, seen = len(names), [], np.zeros(len(names), bool)
            for folder, own in zip(opened, numbers, strict=True):
                place = np.asarray([own[name] for name in folder.table.index], np.int64)
                taken.append(np.where(seen[place], -1, place))
                seen[place] = True
            meta = index.write_cells(writer, opened, taken, n)
            meta |= inverted.write(writer, opened, numbers, n, gene_info)
            _write_decoder(writer, opened, taken, n)
            writer.finish(key=key, n_features=n, **meta)

        made = index.opened(Path(state) / "index", key, make)
        return cls(opened, made, fingerprint, columns)

    def close(self) -> None:
        """Lets go of what is held; the run is of no use afterwards."""
        self.__dict__.clear()

    @property
    def n_features(self) -> int:
        """Features of all folders together."""
        return len(self.names)

    def feature(self, name: str) -> int | None:
        """The number of a feature, by the name that any of the folders gives it."""
        return next((own[name] for own in self._numbers if name in own), None)

    @cached_property
    def gene_number(self) -> dict[str, int]:
        """Numbers of the genes by the run's own names."""
        return {name: i for i, name in enumerate(self.genes)}

    @cached_property
    def term_number(self) -> dict[str, int]:
        """Numbers of the terms."""
        return {name: i for i, name in enumerate(self.terms)}

    @cached_property
    def named(self) -> dict[str, np.ndarray]:
        """Which term names which feature, rising; see inverted.py."""
        keys = ("feature", "term", "side", "log10_q", "auc", "nes", "by")
        return {key: np.array(self.index[f"named.{key}"]) for key in keys}

    @cached_property
    def feature_terms(self) -> sparse.csr_array:
        """Which terms each feature has, bool [features, terms]: those of the lens, and of the genes
        attributed to it. That its cells differ in a term's genes (GSEA of DGE) is no name: most
        features have dozens of those."""
        ours = self.named["by"] != inverted.BY.index("dge")
        places = (self.named["feature"][ours], self.named["term"][ours])
        ones = np.ones(len(places[0]), bool)
        return sparse.csr_array((ones, places), shape=(self.n_features, len(self.terms)))

    def rows(
        self, table: str, feature: int, names: Sequence[str], folder: int | None = None
    ) -> pd.DataFrame | None:
        """The rows of a feature in a long table of the first folder that has any, or of one folder;
        None if there are none.

        `attrs["folder"]` of them is the folder's number.
        """
        for i, tables in enumerate(self._tables):
            if table not in tables or folder not in (None, i):
                continue
            if (found := tables[table].of(feature, names)) is not None:
                found.attrs["folder"] = i
                return found
        return None

    def has(self, table: str) -> bool:
        """Whether any folder has a long table."""
        return any(table in tables for tables in self._tables)

    def there(self, what: str) -> bool:
        """Whether the run has a panel of `PANELS`, at least of some features."""
        known = {
            "cells": self.n_cells > 0, "maps": bool(self.maps), "sets": self.has_sets,
            "decoder": "decoder" in self.index,
            "deletion": self.index.meta["curves"]["deletion"] is not None,
            "feature_map": self.feature_map is not None,
            "terms": self.has("top_terms") or self.has("enrichment"),
            "gene_info": self.index.meta["gene_info"] is not None,
            "dge": self.has("dge") or self.has("genes"),
        }  # fmt: skip
        return known.get(what, self.has(what.replace("/", "_")))

    def missing(self, what: str) -> str:
        """Why a panel is not there, of the run or of one feature, and what makes it."""
        return absent.FEATURE[what] if self.there(what) else absent.RUN[what]

    def groups(self, folder: int) -> str:
        """Which cells a folder's program compares for differential expression."""
        if self.folders[folder].program == "concepts":
            return (
                "Up to 1,000 cells in which the feature is highest, against as many silent cells "
                "nearest to them."
            )
        high = self.folders[folder].settings.get("percentile", 99)
        return f"Cells above the {high:g}th percentile of activation, against all silent cells."

    @cached_property
    def naming_test(self) -> str | None:
        """The test of gene sets by which terms are ranked."""
        long = [tables["enrichment"] for tables in self._tables if "enrichment" in tables]
        return inverted.naming_test(long[0].columns) if long else None

    def tests(self) -> str:
        """What the numbers of the lens' terms mean."""
        told = {
            "change": "p and q: of the mean change of the term's genes between high and silent "
            "cells, standardised by permuted features. A term names the feature if also more of "
            "the genes that differ are in it than among genes of like expression.",
            "matched": "p and q: whether more of the genes that differ are in the term than among "
            "genes of like expression.",
            "fisher": "p and q: Fisher's exact test of the genes that differ.",
        }
        ends = "AUC: chance that a gene of the term ranks above one outside it."
        return " ".join([told.get(self.naming_test or "change", ""), ends]).strip()

    @cached_property
    def cells(self) -> Texts:
        """Names of the cells."""
        return self.index.texts("cells")

    def brief(self, feature: int) -> dict[str, Any]:
        """A feature in a list: number, name, label."""
        label = self._briefs[feature]
        return {"feature": feature, "name": self.names[feature], "label": label}

    @cached_property
    def _briefs(self) -> list[str | None]:
        known = self.features["label"] if "label" in self.features else [None] * self.n_features
        return [None if value is None else str(value) for value in known]

    @property
    def has_sets(self) -> bool:
        """Whether the genes of the terms are known."""
        return bool(self.index.meta["has_sets"])

    def genes_of(self, term: int, folder: int | None = None) -> np.ndarray:
        """Numbers of a term's genes, rising, as one folder tested it or by all; none where it is
        not known."""
        name = "sets" if folder is None else f"sets.{folder}"
        if f"{name}.indptr" not in self.index:
            return np.empty(0, np.uint32)
        first, last = self.index[f"{name}.indptr"][term : term + 2].tolist()
        return self.index[f"{name}.indices"][first:last]

    def size(self, term: int) -> int | None:
        """How many genes a term has."""
        return self.sizes[term] if self.sizes[term] >= 0 else None

    def gene_info(self, gene: int) -> tuple[str | None, str, str | None, str | None, list[str]]:
        """NCBI's number, symbol, Ensembl id, description and aliases of a gene."""
        table = self.index.meta["gene_info"]
        name = self.genes[gene]
        if table is None or table[gene] is None:
            ensembl = name.split(".")[0] if gene_names.naming_of(name) == "ensembl" else None
            return None, name, ensembl, None, []
        number, symbol, ensembl, description, aliases = table[gene]
        return number, symbol, ensembl, description, [a for a in (symbol, *aliases) if a != name]

    def told(self, gene: int) -> str | None:
        """The description of a gene."""
        table = self.index.meta["gene_info"]
        return None if table is None or table[gene] is None else table[gene][3]

    def label_sizes(self, column: int) -> np.ndarray:
        """Cells of every label of a column of metadata."""
        return self._label_sizes[column]

    @cached_property
    def _label_sizes(self) -> dict[int, np.ndarray]:
        return {
            number: np.bincount(
                self.index[f"metadata.{self.metadata[number][0]}"],
                minlength=len(held["categories"]) + 1,
            )[: len(held["categories"])]
            for number, held, _ in self.labels()
        }

    def programs(self) -> list[str]:
        """Of the folders."""
        return [folder.program for folder in self.folders]

    @cached_property
    def feature_map(self) -> np.ndarray | None:
        """Coordinates [features, 2] by terms, NaN for those without; None where there is none."""
        for folder, own in zip(self.folders, self._numbers, strict=True):
            path = folder.path / "feature_space.parquet"
            if path.exists():
                found = np.full((self.n_features, 2), np.nan)
                with reading(path):
                    table = files.read_parquet(path)
                    place = [own[name] for name in table["feature"].astype(str)]
                    found[place] = table[["umap_1", "umap_2"]].to_numpy(np.float64)
                return found if np.isfinite(found).any() else None
        return None

    @cached_property
    def nulls(self) -> list[dict[str, Any]]:
        """Share of features that are named: the run's own first, then where less is to be found."""
        for folder in self.folders:
            path = folder.path / "nulls.csv"
            if path.exists():
                with reading(path):
                    table = pd.read_csv(path)
                    kinds = {"features": str, "named": float}
                    return table[list(kinds)].astype(kinds).to_dict("records")
        return []

    def describe_cells(self, cells: np.ndarray) -> list[dict[str, Any]]:
        """All that the metadata say of some cells."""
        found: dict[str, list[Any]] = {}
        for i, held in (*self.identifiers, *self.metadata):
            if held["kind"] == "name":
                texts = self.index.texts(f"metadata.{i}")
                found[held["name"]] = [texts[cell] or None for cell in cells.tolist()]
            elif held["kind"] == "number":
                found[held["name"]] = self.index[f"metadata.{i}"][cells].tolist()
            else:
                names = [*held["categories"], None]  # the code after the last is missing
                codes = self.index[f"metadata.{i}"][cells].tolist()
                found[held["name"]] = [names[code] for code in codes]
        return [{name: values[k] for name, values in found.items()} for k in range(len(cells))]

    def labels(self) -> list[tuple[int, dict[str, Any], slice]]:
        """Columns of labels: number among `metadata`, what it is, its labels' place in "auroc"."""
        number = {stored: k for k, (stored, _) in enumerate(self.metadata)}
        found, first = [], 0
        for stored, held in enumerate(self.index.meta["columns"]):
            if held["kind"] == "category":
                last = first + len(held["categories"])
                if stored in number:
                    found.append((number[stored], held, slice(first, last)))
                first = last
        return found

    def _completed(self, table: pd.DataFrame) -> pd.DataFrame:
        """With what the index counts: terms of every feature, and labels where no program told, or
        several did: these are of the same columns for all features."""
        found: dict[str, Any] = {}
        count = np.diff(self.feature_terms.indptr)
        if self.terms:
            found["n_terms"] = count.astype(np.int64)
        if self.n_cells:
            n_active = np.diff(self.index["by_feature.indptr"])
            found |= {"n_active": n_active, "density": n_active / self.n_cells,
                      "max_activation": np.array(self.index["maximum"], np.float64)}  # fmt: skip
            mean = np.full(len(n_active), np.nan)
            np.divide(self.index["sum"], n_active, out=mean, where=n_active > 0)
            found["mean_active"] = mean
            several = len(self.folders) > 1
            if (several or "auroc" not in table) and (labels := self._described()):
                found |= self._best_labels(labels)
        table = table.assign(**found)
        order = [column.name for column in columns.STANDARD if column.name in table]
        return table[[*order, *(name for name in table if name not in order)]]

    def _described(self) -> list[tuple[int, dict[str, Any], slice]]:
        """Of `labels` those that the first program to tell took for labels, or else all."""
        told = next((names for folder in self.folders if (names := folder.labels())), [])
        return [each for each in self.labels() if each[1]["name"] in told] or self.labels()

    def _best_labels(self, labels: list[tuple[int, dict[str, Any], slice]]) -> dict[str, Any]:
        """Of all labels of some columns the one that each feature tells best."""
        names = [value for _, held, _ in labels for value in held["categories"]]
        of = [held["name"] for _, held, _ in labels for _ in held["categories"]]
        own = np.concatenate([np.arange(place.start, place.stop) for _, _, place in labels])
        areas = self.index["auroc"][:, own].astype(np.float64)
        none = np.isnan(areas).all(axis=1)
        best = np.where(np.isnan(areas), -np.inf, areas).argmax(axis=1)
        return {
            "label": np.where(none, None, np.asarray(names, object)[best]),
            "label_column": np.where(none, None, np.asarray(of, object)[best]),
            "auroc": np.where(none, np.nan, areas[np.arange(len(areas)), best]),
        }


def _union(folders: Sequence[Folder]) -> tuple[list[str], list[dict[str, int]]]:
    """The names of all features, and of each folder the numbers of its own.

    Features are the same where kind and latent are; one whose latent is not known, where its name
    is. The first folder's name counts.
    """
    names: list[str] = []
    known: dict[tuple[str, Any], int] = {}
    numbers = []
    for folder in folders:
        own: dict[str, int] = {}
        kinds, latents = folder.table["kind"], folder.table["latent"]
        for name, kind, latent in zip(folder.table.index, kinds, latents, strict=True):
            key = (str(kind), int(latent) if latent >= 0 else name)
            if key not in known:
                known[key] = len(names)
                names.append(name)
            own[name] = known[key]
        if len(set(own.values())) < len(own):
            raise InputError(f"{folder.path}: two features have the same kind and latent.")
        numbers.append(own)
    if len(set(names)) < len(names):
        again = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two features of the folders are called {again[:100]!r}.")
    return names, numbers


def _check_together(folders: Sequence[Folder]) -> None:
    """Refuse folders of other cells, or of another dictionary."""
    first = folders[0]
    for other in folders[1:]:
        pair = f"{first.path} and {other.path}"
        for folder in (first, other):
            if folder.cells is None:
                raise InputError(
                    f"{folder.path} has no features.h5ad, so it cannot be told whether {pair} "
                    "belong together: run its program again with --resume, or open it alone."
                )
        if not first.cells.equals(other.cells):
            raise InputError(f"{pair} are of different cells: open them one at a time.")
        shared = [
            [name for name, kind in zip(folder.table.index, folder.table["kind"], strict=True)
             if kind == "concept"]
            for folder in (first, other)
        ]  # fmt: skip
        latents = [folder.table["latent"].loc[names]
                   for folder, names in zip((first, other), shared, strict=True)]  # fmt: skip
        both = np.intersect1d(*(some[some >= 0] for some in latents))
        if not len(both):
            raise InputError(f"{pair} share no feature: they are not of the same dictionary.")
        for what, values in (("decoders", _decoders), ("activations", _counts)):
            a, b = values(first, both), values(other, both)
            if a is None or b is None:
                continue
            if a.shape != b.shape or not np.allclose(a, b, rtol=1e-4, atol=1e-6):
                raise InputError(
                    f"{pair} are of different dictionaries (their {what} differ): open them one at "
                    "a time, or run the one with the other's --dictionary."
                )
            break


def _rows_of(folder: Folder, latents: np.ndarray) -> np.ndarray:
    concept = (folder.table["kind"] == "concept").to_numpy()
    place = pd.Series(np.flatnonzero(concept), index=folder.table["latent"].to_numpy()[concept])
    return place.loc[latents].to_numpy()


def _decoders(folder: Folder, latents: np.ndarray) -> np.ndarray | None:
    return None if folder.decoder is None else folder.decoder[_rows_of(folder, latents)]


def _counts(folder: Folder, latents: np.ndarray) -> np.ndarray | None:
    if "n_active" not in folder.table:
        return None
    return folder.table["n_active"].to_numpy(np.float64)[_rows_of(folder, latents)]


def _write_decoder(
    writer: index.Writer, folders: Sequence[Folder], taken: Sequence[np.ndarray], n: int
) -> None:
    """Decoder rows of length 1; NaN where not known. Nothing where no folder knows any."""
    known = [i for i, folder in enumerate(folders) if folder.decoder is not None]
    if not known:
        return
    found = np.full((n, folders[known[0]].decoder.shape[1]), np.nan, np.float32)
    for i in known:
        ours = taken[i] >= 0
        rows = folders[i].decoder[ours]
        size = np.linalg.norm(rows, axis=1, keepdims=True)
        found[taken[i][ours]] = np.divide(
            rows, size, out=np.full_like(rows, np.nan), where=size > 0
        )
    writer.save("decoder", found)


def _fingerprint(folders: Sequence[Path]) -> str:
    """Of the contents of the files that are read, wherever the folders lie."""
    parts = [
        [(name, _sha256(folder / name)) for name in READ if (folder / name).exists()]
        for folder in folders
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"there is no file {path}: check the path.")
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
