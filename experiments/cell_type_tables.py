"""Tables 1 to 4 of Kendiukhov and the progression over layers, out of what was trained and studied;
and the numbers that the paper prints for them."""

from typing import Any

import numpy as np
import pandas as pd

import sae_jax
from analysis import cell_types
from experiments.cell_type_features import ALIVE, FEW, NULLS, Cells
from sae_jax import InputError

KEY = ["layer", "trained_on", "member"]
CONFIG = ["layer", "trained_on", "reduction", "l1_weight", "n_latents"]

# The paper's, of scGPT's brain checkpoint on 1,000 immune cells of Tabula Sapiens, 2,048 latents:
# tables 2 and 3 and section 4.2, by layer and penalty (a mean over dimensions and latents).
TABLE_2 = pd.DataFrame(
    [
        (0, 1.0, 581, 0.969, 2048), (0, 3.0, 251, 0.917, 2048), (0, 10.0, 54, 0.761, 2029),
        (6, 1.0, 592, 0.970, 2048), (6, 3.0, 239, 0.923, 2048), (6, 10.0, 51, 0.809, 1206),
        (11, 1.0, 553, 0.972, 2048), (11, 3.0, 219, 0.934, 2029), (11, 10.0, 48, 0.834, 699),
    ],
    columns=["number", "l1_weight", "paper_l0", "paper_r2", "paper_alive"],
)  # fmt: skip
TABLE_3 = pd.DataFrame(
    [
        (0, 0.01, 1813, 0.0016), (0, 0.1, 1258, 0.0097), (6, 0.01, 1943, 0.0007),
        (6, 0.1, 1388, 0.0082), (11, 0.01, 1940, 0.0010), (11, 0.1, 1412, 0.0074),
    ],
    columns=["number", "l1_weight", "paper_l0", "paper_mse"],
)  # fmt: skip
PROGRESSION = pd.DataFrame(
    [
        (0, 1.0, 0.689, 2, np.nan, np.nan), (6, 1.0, 0.794, 8, 902, np.nan),
        (11, 1.0, 0.838, 12, 1284, np.nan), (11, 3.0, 0.772, 5, 302, 472),
        (11, 10.0, np.nan, np.nan, 122, 160),
    ],
    columns=["number", "l1_weight", "paper_auroc", "paper_types", "paper_annotated", "paper_alive"],
)  # fmt: skip
TABLE_4 = pd.DataFrame(
    [(11, "latents", 3.0, 0.772, 5, 0.64), (11, "components", np.nan, 0.819, np.nan, np.nan)],
    columns=["number", "features", "l1_weight", "paper_auroc", "paper_types", "paper_annotated"],
)


def trained(run: sae_jax.Run, layer: str, rows: str) -> pd.DataFrame:
    """One row per dictionary of a layer: L0, R², alive of held-out rows, where any are held out.

    `mse` is of the last epoch's batches, in the z-scored space, as the paper's seems to be.
    """
    table = run.results
    split = "validation" if "validation_l0" in table else "train"
    last = run.history.sort_values("epoch").groupby("member")["mse"].last()
    return pd.DataFrame(
        {
            "layer": layer,
            "trained_on": rows,
            "member": table["member"],
            "reduction": table["reduction"],
            "l1_weight": table["l1_weight"],
            "l1_weight_as_sum": as_sum(table),
            "n_latents": table["n_latents"],
            "status": table["status"],
            "l0": table[f"{split}_l0"],
            "r2": table[f"{split}_r2"],
            "r2_training_rows": table["train_r2"],
            "mse": table["member"].map(last),
            "alive": table[f"{split}_alive_1pct"],
            "dead": table["n_latents"] - table[f"{split}_alive_1pct"],
        }
    )


def as_sum(table: pd.DataFrame) -> pd.Series:
    """The penalty that equation 4, printed with sums, would need: weight_mean d_in / n_latents."""
    mean = table["reduction"] == "mean"
    return table["l1_weight"] * np.where(mean, table["d_in"] / table["n_latents"], 1)


def of_paper(cells: Cells, results: pd.DataFrame, summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Tables 1 to 4 and `layers`, the paper's numbers beside ours where the setting is the same."""
    latents = summary[summary["features"] == "latents"]
    seen = latents[[*KEY, "cell_features", "alive", "l0", "n_cells"]].rename(
        columns={"alive": "alive_cells", "l0": "l0_cells"}
    )
    if "r2_cells" in latents:
        seen["r2_cells"] = latents["r2_cells"]
    table_2 = results.merge(seen, on=KEY, how="left")
    table_2["dead_cells"] = table_2["n_latents"] - table_2["alive_cells"]
    table_2 = table_2.drop(columns=["member", "status", "n_cells"])
    low = table_2["l1_weight"] < 1
    table_3 = table_2.loc[low, [*CONFIG, "l0", "mse", "r2"]].drop_duplicates()
    table_3["alive_percent"] = 100 * table_2.loc[low, "alive"] / table_2.loc[low, "n_latents"]
    return {
        "table_1": composition(cells),
        "table_2": beside(table_2.drop(columns="mse"), TABLE_2),
        "table_3": beside(table_3, TABLE_3),
        "table_4": compared(summary),
        "layers": beside(progression(summary), PROGRESSION),
    }


def composition(cells: Cells) -> pd.DataFrame:
    """Cells of each type: all, to choose on, held out; and whether there are enough to be told."""
    of = [cells.labels.iloc[some].value_counts() for some in (cells.choose, cells.measure)]
    table = pd.DataFrame({"cells": cells.labels.value_counts(), "chosen_on": of[0],
                          "measured_on": of[1]}).fillna(0).astype(int)  # fmt: skip
    table["told_apart"] = (table[["chosen_on", "measured_on"]] >= cells.least).all(axis=1)
    table = table.sort_values("cells", ascending=False, kind="stable")
    return table.rename_axis("type").reset_index()


def progression(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per layer and set of features: AUROC, types told, marker sets, beside chance."""
    table = summary.assign(reduction=summary["reduction"].fillna(""))
    for null in NULLS:
        for sides in cell_types.SIDES:
            name = f"{null}annotated_{sides}"
            table[f"share_{name}"] = table[name] / table["alive"].where(table["alive"] > 0)
    first = ["layer", "cell_features", "features", "trained_on", "reduction", "l1_weight",
             "n_latents"]  # fmt: skip
    return table[[*first, *(name for name in table if name not in first)]]


def compared(summary: pd.DataFrame) -> pd.DataFrame:
    """Table 4: latents beside components and dimensions, of every layer, side by side."""
    table = progression(summary)
    sides = np.where(table["features"] == "latents", "one", "two")
    for name in ("auroc", "types"):
        of = table[[f"all_cells_{name}_one", f"all_cells_{name}_two"]].to_numpy()
        table[f"authors_{name}"] = np.where(sides == "one", of[:, 0], of[:, 1])
    table["alive_percent"] = 100 * table["alive"] / table["n_features"]
    kept = {
        "layer": "layer", "cell_features": "cell_features", "features": "features",
        "reduction": "reduction", "l1_weight": "l1_weight", "n_features": "n",
        "auroc_one": "auroc_one", "auroc_two": "auroc_two",
        "few_auroc_one": f"auroc_one_of_{FEW}", "few_auroc_two": f"auroc_two_of_{FEW}",
        "types_one": "types_one", "types_two": "types_two",
        "share_annotated_one": "annotated_one", "share_permuted_annotated_one": "permuted_one",
        "share_relabelled_annotated_one": "relabelled_one",
        "share_annotated_two": "annotated_two", "l0": "l0_cells", "alive_percent": "alive_percent",
        "authors_auroc": "authors_auroc", "authors_types": "authors_types",
    }  # fmt: skip
    found = beside(table[[*kept, "n_latents"]].rename(columns=kept), TABLE_4)
    return found.drop(columns="n_latents")


def beside(table: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """The table, with the paper's columns where layer, penalty, mean and 2,048 latents agree."""
    number = table["layer"].str.extract(r"^layer_(\d+)$")[0].astype(float)
    same = (table["reduction"] == "mean") & (table["n_latents"] == 2048)
    if "features" in table:
        same = same | (table["features"] == "components")
    keys = [key for key in ("number", "features", "l1_weight") if key in paper]
    keyed = table.assign(number=number.where(same, -1))
    found = keyed.merge(paper, on=keys, how="left").drop(columns="number")
    absent = [column for column in paper if column not in keys and found[column].isna().all()]
    return found.drop(columns=absent)


def shown(
    summary: pd.DataFrame, layer: str | None, l1_weight: float, reduction: str
) -> dict[str, Any]:
    """The dictionary that the page shows in detail, as its row of `summary`.

    Of the layer (the last if None) the one of this reduction and of the nearest penalty, on a log
    scale; of several widths the narrowest, of several ways the first.

    Raises:
      InputError: no such layer.
    """
    latents = summary[(summary["features"] == "latents")]
    if latents.empty:
        raise InputError("every dictionary diverged; lower --learning_rate")
    layer = latents["layer"].iloc[-1] if layer is None else layer
    latents = latents[latents["layer"] == layer]
    if latents.empty:
        raise InputError(
            f"--shown_layer={layer} is not one of {', '.join(summary['layer'].unique())}"
        )
    of = latents[latents["reduction"] == reduction]
    of = latents if of.empty else of
    away = np.abs(np.log(of["l1_weight"] / max(l1_weight, 1e-9)))
    nearest = of[away == away.min()].sort_values("n_latents", kind="stable")
    return {
        "alive_share": ALIVE,
        **nearest.iloc[0].to_dict(),
        "member": int(nearest.iloc[0]["member"]),
    }
