"""Names of genes: symbols, synonyms, Ensembl and Entrez ids of one species, mapped to each other.

The table is NCBI's gene_info. A name is only ever mapped where it means one gene: a current symbol
wins over a synonym, and what several genes share maps to nothing and is counted.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from sae_jax.errors import InputError
from sae_jax.reading import reading

NAMINGS = ("symbol", "ensembl", "entrez")
ENSEMBL = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?")
HUMAN = 9606
LARGEST_TEXT = 2**30  # bytes, unpacked

# How a name was understood, in the order in which one name of a gene is preferred to another.
CURRENT, SYNONYM, AMBIGUOUS, UNKNOWN = "current", "synonym", "ambiguous", "unknown"
_COLUMNS = ["#tax_id", "GeneID", "Symbol", "Synonyms", "dbXrefs"]
_AUTHORITY = "Symbol_from_nomenclature_authority"


@dataclass(frozen=True, eq=False)
class MapReport:
    """What became of the names that were mapped.

    to: the naming asked for.
    how: of each name, whether it is a "current" symbol or an id, a "synonym" of one gene, an
        "ambiguous" name of several genes, mapped to nothing, or "unknown".
    ambiguous, unknown: those names, each once, as they were given.
    n_without: names of a known gene that has no name of the kind asked for, or several.
    n_shared: names that map where another of the names maps too.
    """

    to: str
    how: list[str]
    ambiguous: list[str]
    unknown: list[str]
    n_without: int
    n_shared: int

    def __str__(self) -> str:
        n = Counter(self.how)
        parts = [f"{n[CURRENT]} of {len(self.how)} names are current"]
        parts += [f"{n[SYNONYM]} synonyms of one gene"]
        parts += [f"{n[AMBIGUOUS]} ambiguous{_examples(self.ambiguous)}"]
        parts += [f"{n[UNKNOWN]} unknown{_examples(self.unknown)}"]
        if self.n_without:
            parts.append(f"{self.n_without} without one {self.to} name")
        if self.n_shared:
            parts.append(f"{self.n_shared} share a gene with another")
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class GeneTable:
    """The names of the genes of one species, each gene known by its Entrez id.

    symbol, ensembl: of each Entrez id; ensembl only where the gene has just one.
    current: the genes that each name stands for as a current symbol, an Entrez or an Ensembl id.
    synonyms: the genes that carry each name as a synonym.
    """

    symbol: Mapping[str, str]
    ensembl: Mapping[str, str]
    current: Mapping[str, Sequence[str]]
    synonyms: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.symbol)

    def map(
        self, names: Iterable[str], to: str = "symbol", naming: str | None = None
    ) -> tuple[np.ndarray, MapReport]:
        """Other names of the same genes.

        Names are compared exactly, upper and lower case told apart; the version after the dot of an
        Ensembl id is ignored.

        Args:
            names: symbols, synonyms, Ensembl or Entrez ids, as they come, also mixed.
            to: "symbol", "ensembl" or "entrez".
            naming: what the names are, when they are to be nothing else; otherwise told from each.

        Returns:
            One name for each, None where there is none [names, dtype object], and the report.

        Raises:
            InputError: if `to` or `naming` is no naming, or a name no text.
        """
        names = _texts(names)
        for given in (to, naming or to):
            if given not in NAMINGS:
                raise InputError(f"{given!r} is no naming of genes: take one of {NAMINGS}.")
        if naming and naming not in map(naming_of, names):
            raise InputError(f"no gene's name looks like {naming}: {', '.join(names[:3])}.")
        understood = [self._understand(name, naming or naming_of(name)) for name in names]
        how = [known for known, _ in understood]
        genes = [gene for _, gene in understood]
        target = {"symbol": self.symbol, "ensembl": self.ensembl}.get(to)
        mapped = [gene if gene is None or target is None else target.get(gene) for gene in genes]
        times = Counter(name for name in mapped if name is not None)
        pairs = list(zip(names, how, strict=True))
        report = MapReport(
            to=to,
            how=how,
            ambiguous=list(dict.fromkeys(name for name, known in pairs if known == AMBIGUOUS)),
            unknown=list(dict.fromkeys(name for name, known in pairs if known == UNKNOWN)),
            n_without=sum(m is None and g is not None for m, g in zip(mapped, genes, strict=True)),
            n_shared=sum(n for n in times.values() if n > 1),
        )
        return np.asarray(mapped, dtype=object), report

    def _understand(self, name: str, naming: str) -> tuple[str, str | None]:
        """How a name is known, and the Entrez id of its gene if it means just one."""
        if naming == "ensembl":
            name = name.split(".")[0]
        if naming != naming_of(name):  # a symbol where ids were promised, or the other way round
            return UNKNOWN, None
        how, genes = CURRENT, self.current.get(name, ())
        # An Entrez id that was withdrawn may be a synonym too, by its digits only.
        if not genes and naming == "symbol":
            how, genes = SYNONYM, self.synonyms.get(name, ())
        if len(genes) == 1:
            return how, genes[0]
        return AMBIGUOUS if genes else UNKNOWN, None


def naming_of(name: str) -> str:
    """What a gene's name is by its looks: "ensembl", "entrez" (digits only) or "symbol"."""
    if ENSEMBL.fullmatch(name):
        return "ensembl"
    return "entrez" if name.isascii() and name.isdigit() else "symbol"


def why_apart(set_genes: set[str], genes: set[str], n_found: int = 0) -> str:
    """What probably keeps two lists of gene names apart; empty if nothing tried helps much.

    Args:
        set_genes, genes: the names of the gene sets' and of the measured genes.
        n_found: how many they have in common.
    """

    def mostly_ensembl(names: set[str]) -> bool:
        return 2 * sum(naming_of(name) == "ensembl" for name in names) > len(names)

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


def read(path: str | Path, taxon: int = HUMAN) -> GeneTable:
    """Reads NCBI's gene_info, as `Homo_sapiens.gene_info.gz`.

    A gene's symbol is the one that the nomenclature authority gave it (MT-ND1), else NCBI's (ND1,
    a current name too). Where records share a symbol or an Ensembl id, that of which it is the
    official symbol has it, or else those that have an official symbol.

    Args:
        path: the file, plain or gzip (told by its content).
        taxon: NCBI's number of the species, as the file may hold several.

    Raises:
        InputError: if it is missing, damaged or no such table, or has no genes of the taxon.
    """
    text = read_text(path, "gene table", "NCBI's gene_info")
    head = text.partition("\n")[0].split("\t")
    if missing := [name for name in _COLUMNS if name not in head]:
        raise InputError(f"{path} is not NCBI's gene_info: its first line lacks {missing}.")
    # A gene may be called NA or NaN; a name may begin with a quotation mark.
    columns = [*_COLUMNS, *({_AUTHORITY} & set(head))]
    with reading(path):
        table = pd.read_csv(
            io.StringIO(text), sep="\t", usecols=columns, dtype=str, na_filter=False, quoting=3
        )
    ours = table[table["#tax_id"] == str(taxon)]
    if ours.empty:
        found = ", ".join(f"{k} ({n} genes)" for k, n in table["#tax_id"].value_counts().items())
        raise InputError(f"{path} has no genes of taxon {taxon}, but of {found or 'none at all'}.")
    symbol: dict[str, str] = {}
    ensembl: dict[str, str] = {}
    claims: dict[str, list[tuple[int, str]]] = {}
    synonyms: dict[str, list[str]] = {}
    for row in ours[columns].to_dict("records"):
        gene, name = row["GeneID"], row["Symbol"]
        official = row.get(_AUTHORITY, "-")
        named = official != "-"
        symbol[gene] = official if named else name
        ids = {x.removeprefix("Ensembl:") for x in _split(row["dbXrefs"]) if x[:8] == "Ensembl:"}
        if len(ids) == 1:
            ensembl[gene] = min(ids)
        for known in {gene, name, symbol[gene], *ids}:
            claims.setdefault(known, []).append((named + (known == official), gene))
        for other in set(_split(row["Synonyms"])):
            synonyms.setdefault(other, []).append(gene)
    current = {
        name: [gene for strength, gene in claimed if strength == max(claimed)[0]]
        for name, claimed in claims.items()
    }
    return GeneTable(symbol, ensembl, current, synonyms)


def read_text(path: str | Path, what: str, form: str) -> str:
    """The text of a file, plain or gzip (told by its content), with \\n at the ends of lines.

    Args:
        path: the file.
        what: what an error message calls the file.
        form: the format that an error message asks for.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no {what} file {path}: check the path.")
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with reading(path), gzip.open(path) if packed else path.open("rb") as file:
            parts = iter(lambda: file.read(2**24), b"")
            content = b"".join(islice(parts, LARGEST_TEXT // 2**24 + 1))
            text = content.decode("utf-8-sig")
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, EOFError | gzip.BadGzipFile | zlib.error):
            raise InputError(f"{path} is a damaged gzip file ({cause}): fetch it again.") from None
        if isinstance(cause, UnicodeDecodeError):
            raise InputError(f"{path} is not a text file: give {form}.") from None
        raise
    if len(content) > LARGEST_TEXT:
        raise InputError(f"{path} holds more than 1 GiB of text: give {form}, of one species.")
    if "\0" in text:
        raise InputError(f"{path} is not a text file: give {form}.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _texts(names: Iterable[str]) -> list[str]:
    names = list(names)
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise InputError(f"genes must be names, but gene {position} is {name!r}.")
    return names


def _split(field: str) -> list[str]:
    return [] if field == "-" else field.split("|")


def _examples(names: Sequence[str]) -> str:
    return f" ({', '.join(islice(names, 3))})" if names else ""
