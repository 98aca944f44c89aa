"""A run that answers like documents.py, and a server of its studies alone."""

import argparse
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.templating import Jinja2Templates

from analysis.browser import assets, safety, study, study_draw, study_pages

N_CONCEPTS, N_NEURONS, N_GENES = 14, 12, 40
NASTY = "<img src=x onerror=alert(1)>"
SECRETS = (
    "concept_", "neuron", "dim7", "feature_", "hidden label", "hidden term", "auroc", "density",
    "barcode", "activation", "celltype:share",
)  # fmt: skip


class Documents:
    """14 concepts, then 12 neurons. Concept 3 has few genes, neuron 20 few cells, 21 nothing."""

    def __init__(
        self, scale: float = 1.0, gene_info: bool = True, samples: bool = True, cells: bool = True
    ) -> None:
        self.scale, self.gene_info, self.samples, self.cells = scale, gene_info, samples, cells
        n = N_CONCEPTS + N_NEURONS
        self.names = [f"concept_{i}" for i in range(N_CONCEPTS)]
        self.names += [f"dim{i}+" for i in range(N_NEURONS)]
        self.kinds = ["concept"] * N_CONCEPTS + ["neuron"] * N_NEURONS
        rng = np.random.default_rng(0)
        self.values = np.sort(rng.normal(size=(n, N_GENES)), axis=1)[:, ::-1]
        self.samples_of = rng.normal(size=(n, 6, N_GENES))

    def __call__(self, key: str) -> dict[str, Any]:
        parts = key.split("/")
        if key == "about":
            columns = [
                {"name": "celltype", "kind": "category", "n_categories": 4},
                {"name": "barcode", "kind": "category", "n_categories": 900},
                {"name": "n_counts", "kind": "number", "n_categories": None},
            ]
            return {"columns": columns, "n_cells": 1000, "gene_info": self.gene_info,
                    "panels": {"cells": None if self.cells else "Make it again: --resume."},
                    "fingerprint": "f00d", "title": "hidden label"}  # fmt: skip
        if key == "features":
            codes = np.array([0] * N_CONCEPTS + [1] * N_NEURONS)
            kind = {"codes": codes, "categories": ["concept", "neuron"], "missing": None}
            return {"names": self.names, "columns": {"kind": kind, "density": np.ones(len(codes))}}
        if parts[0] == "gene":
            return {"links": [{"title": "NCBI Gene", "href": f"https://gene/{parts[1]}"}],
                    "driven": ["concept_1"], "terms": ["hidden term"]}  # fmt: skip
        feature = int(parts[1])
        return getattr(self, f"_{parts[2]}")(feature)

    def _attribution(self, feature: int) -> dict[str, Any]:
        if feature == 21:
            return {"absent": "dim7+ is not attributed: sae-jax concepts --all"}
        n = 5 if feature == 3 else N_GENES
        genes = [NASTY if g == 0 else f"G{feature}_{g}" for g in range(n)]
        n_samples = 5 if feature == 0 else 6
        samples = {
            "prototypes": [{"cell": 5, "name": "barcode5"}, {"cell": 6, "name": "barcode6"}],
            "of": [[s // 3, s] for s in range(n_samples)],  # counterfactuals of all prototypes
            "values": (self.scale * self.samples_of[feature, :n_samples, :n]).ravel(),
        }
        return {
            "genes": np.arange(n), "values": self.scale * self.values[feature, :n], "names": genes,
            "descriptions": [f"{NASTY} describes {g}" if g % 2 else None for g in range(n)],
            "samples": samples if self.samples else None, "n_genes": n,
        }  # fmt: skip

    def _page(self, feature: int) -> dict[str, Any]:
        n = 4 if feature == 20 else 12
        if not self.cells:
            return {"bands": []}
        rows = [
            {"cell": c, "name": f"barcode{c}", "activation": 9.0 - c / 7,
             "metadata": {"celltype": f"{NASTY} {(feature + c) % 4}", "barcode": f"barcode{c}",
                          "n_counts": 1234.5678}}
            for c in range(n)
        ]  # fmt: skip
        return {"name": self.names[feature], "kind": self.kinds[feature], "summary": {"auroc": 0.9},
                "labels": ["hidden label"], "bands": [{"title": "top cells", "rows": rows}],
                "terms": ["hidden term"]}  # fmt: skip


def create(state: Path, **settings: Any) -> dict[str, str]:
    """The study "first", written; its raters' tokens."""
    drawn = study_draw.make(Documents(), name="first", n_genes=10, **settings)
    return dict(study.write(state, *drawn))


def app(state: Path, token: str | None = None) -> Starlette:
    """The studies of a state folder, behind the explorer's own guard."""
    context = SimpleNamespace(
        state=state,
        templates=Jinja2Templates(env=assets.live_environment("concept_ run of hidden label")),
        owner=lambda request: safety.owns(request, token) and study_pages.rater_of(request) is None,
    )

    def explorer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("the explorer")

    made = Starlette(
        routes=[
            Route("/", explorer), Route("/data/{key:path}", explorer),
            Route("/static/{hash}/{name}", assets.static), *study_pages.routes(context),
        ],
        middleware=[
            Middleware(safety.Guard, hosts={"testserver", "127.0.0.1"}, token=token,
                       rater_of=study_pages.rater_of)
        ],
    )  # fmt: skip
    made.state.secret, made.state.context = safety.secret(state), context
    return made


def main() -> None:
    """Serve until killed; prints the port."""
    parser = argparse.ArgumentParser()
    parser.add_argument("state", type=Path)
    listening = socket.create_server(("127.0.0.1", 0))
    served = app(parser.parse_args().state)
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(served, log_level="error")).run(sockets=[listening])


if __name__ == "__main__":
    main()
