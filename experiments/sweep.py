r"""A sweep: an embedding in; a dictionary per configuration, their metrics and their frontier out.

    python -m experiments.sweep --preset=vanilla,topk_schuster --data=cells.h5ad:obsm/X_pca \
        --n_latents=40,400 --l1_weight=0.1,1 --k_percent=5,10 --seeds=0,1 --epochs=100 \
        --workdir=runs/sweep                                       (or: sae-jax sweep ...)

Rows come from F.npy, F.h5ad:obsm/KEY, F.h5ad:X, or the same of a .zarr store. Every field of
SAEConfig, k_percent too, is a flag, and its comma list an axis; the grid is all combinations, for
each preset. An axis that a preset has no use for (k_percent for vanilla) is dropped, and said to
be. --dry_run shows the grid. Instead of presets and axes, --config=FILE names a JSON file, either a
list of configurations (fields of SAEConfig; d_in is that of the data) or axes by preset:

    {"presets": {"vanilla": {"n_latents": [40, 400], "l1_weight": [0.1, 1], "seed": [0, 1]}}}

The same command again continues where an earlier one stopped; other settings are refused in the
same folder. For job arrays: --num_shards=8 --shard_index=$SLURM_ARRAY_TASK_ID, of 0 .. 7, and the
same --workdir for all, in which every shard fills a folder of its own.

It takes about 20 seconds for the 16 configurations above on the 700 cells that ship with scanpy
(two cores), most of it to compile four programs. It must show the table and figures/frontier.png:
R² of the held-out rows over their L0, and which configurations nothing else beats in both.
"""

import dataclasses
import json
import shutil
import time
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from absl import flags, logging

import sae_jax
from analysis import plots
from experiments import cli
from sae_jax import InputError, SAEConfig, data, files, workdir

FLAGS = flags.FLAGS

SETTINGS = "sweep.json"  # written first: it tells a folder of ours from anybody's
FILES = {
    SETTINGS: "the flags of this run",
    "configs.json": "every configuration",
    "results.parquet": "one row a configuration: settings and metrics",
    "history.parquet": "one row per configuration and epoch: losses",
    "dictionaries": "one folder a configuration: cfg.json, sae_weights.safetensors",
    "figures": "frontier: PNG and PDF",
}
SHOWN = 8  # rows of the printed table
SCALARS = (int, float, str, bool)


def axis_types() -> dict[str, tuple[type, ...]]:
    """Each field that a flag makes an axis of, and the types of its values."""
    hints = typing.get_type_hints(SAEConfig)
    names = {field.name for field in dataclasses.fields(SAEConfig)} - {"d_in", "seed", "name"}
    found = {
        name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for name, hint in hints.items()
        if name in names
    }
    plain = {name: kinds for name, kinds in found.items() if set(kinds) <= {*SCALARS, type(None)}}
    return {**plain, "k_percent": (float,)}


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("data", None, "Rows: F.npy, F.h5ad:obsm/KEY, F.h5ad:X, F.zarr:obsm/KEY.")
    flags.DEFINE_list("preset", None, f"Of {', '.join(sae_jax.PRESETS)}; a comma list.")
    flags.DEFINE_string("config", None, "JSON file of configurations, instead of presets and axes.")
    flags.DEFINE_string("workdir", None, "Folder to fill.")
    flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --workdir.")
    flags.DEFINE_bool("dry_run", False, "Show what would be trained, and stop.")
    flags.DEFINE_integer("epochs", 100, "Passes over the rows.", lower_bound=1)
    flags.DEFINE_integer(
        "patience", None, "Epochs without a lower loss after which one stops.", lower_bound=1
    )
    flags.DEFINE_float("validation", 0.1, "Share of rows held out; 0: none.", 0, 1)
    flags.DEFINE_integer("data_seed", 0, "Of the rows held out and of the order of training.", 0)
    flags.DEFINE_integer("num_shards", 1, "Jobs that the grid is split between.", lower_bound=1)
    flags.DEFINE_integer("shard_index", 0, "This job, from 0.", lower_bound=0)
    flags.DEFINE_list("seeds", None, "Of the initialisation; a comma list (default 0).")
    defaults = {field.name: field.default for field in dataclasses.fields(SAEConfig)}
    for name, kinds in axis_types().items():
        text = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
        default = defaults.get(name, dataclasses.MISSING)
        known = (
            "" if default in (None, dataclasses.MISSING) else f", else {default} or the preset's"
        )
        flags.DEFINE_list(name, None, f"Axis: {text}{known}.")


def main() -> None:
    """Runs the program by its flags."""
    # 1. Refuse what is wrong before anything is written.
    out = None if FLAGS.dry_run else check_workdir()
    axes = read_axes()
    if not FLAGS.data:
        raise InputError("--data is needed: F.npy, F.h5ad:obsm/KEY or F.zarr:obsm/KEY")
    rows = data.load(FLAGS.data)
    train, validation = split_rows(rows)
    configs = read_configs(axes, rows.shape[1])
    for config in configs:
        if config.batch_size > len(train):
            raise InputError(
                f"batch_size={config.batch_size} is more than the {len(train)} rows to train on"
            )
    whole = len(configs)
    configs = shard(configs, FLAGS.num_shards, FLAGS.shard_index, len(train), FLAGS.epochs)
    if FLAGS.num_shards > 1:
        of = f"{FLAGS.shard_index} of 0 .. {FLAGS.num_shards - 1}"
        print(f"shard {of}: {len(configs)} of {whole} configurations")
    print(describe(configs))
    if out is None:
        return
    claim(out)

    # 2. Train. Each program's results are on disk before the next one starts.
    began = time.perf_counter()
    try:
        run = sae_jax.train(
            configs,
            train,
            validation,
            epochs=FLAGS.epochs,
            workdir=out,
            data_seed=FLAGS.data_seed,
            patience=FLAGS.patience,
            provenance={"data": FLAGS.data, "validation_share": FLAGS.validation},
        )
    except InputError:
        raise
    except BaseException:
        logging.error("stopped; the same command continues from what %s holds", out)
        raise
    logging.info("%d configurations in %.0f s", len(configs), time.perf_counter() - began)

    # 3. Draw, and say where everything lies.
    split = "train" if validation is None else "validation"
    plots.save(plots.frontier(run.results, split=split), out / "figures", "frontier")
    print(f"\n{out}/")
    for name, what in FILES.items():
        print(f"  {name:<20} {what}")
    print(f"\nbest {split} R² at their L0")
    print(best(run.results, split))


def check_workdir() -> Path:
    """The folder to fill, of this shard if there are several. Refuses one that others use."""
    if not FLAGS.workdir:
        raise InputError("--workdir is needed: the folder to fill")
    out = Path(FLAGS.workdir)
    workdir.check_writable(out)
    if FLAGS.num_shards > 1:
        shards = out.glob("shard-*-of-*")
        if out.is_dir() and set(out.iterdir()) - set(shards):
            raise InputError(f"{out} holds other files than shards; choose another folder")
        out = out / f"shard-{FLAGS.shard_index:03d}-of-{FLAGS.num_shards:03d}"
        workdir.check_writable(out)
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise InputError(f"{out} holds other files; choose an empty or a new folder")
    return out


def claim(out: Path) -> None:
    """Make the folder ours: clear what --overwrite replaces, and note the flags."""
    if FLAGS.overwrite:
        for path in (out / name for name in FILES):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if not (out / SETTINGS).exists():
        ours = FLAGS.get_flags_for_module(FLAGS.find_module_defining_flag("num_shards"))
        given = {flag.name: flag.value for flag in ours if flag.value is not None}
        for name in ("workdir", "overwrite", "dry_run"):
            given.pop(name, None)
        files.write_json(out / SETTINGS, given)


def split_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows to train on and rows held out; None without --validation."""
    train, held_out = data.split(len(rows), FLAGS.validation, FLAGS.data_seed)
    if FLAGS.validation == 0:
        return rows, None
    if len(train) < 1 or len(held_out) < 2:
        raise InputError(
            f"--validation={FLAGS.validation:g} of {len(rows)} rows leaves {len(train)} to train "
            f"on and {len(held_out)} held out; at least 2 are held out, or 0 is given for none"
        )
    return rows[train], rows[held_out]


def read_axes() -> dict[str, list[Any]] | None:
    """The axes that flags give, by field of SAEConfig; None with --config, which excludes them."""
    kinds = axis_types()
    given = [name for name in ("preset", "seeds", *kinds) if FLAGS[name].value is not None]
    if FLAGS.config:
        if given:
            raise InputError(f"--config says what to train; leave out --{', --'.join(given)}")
        return None
    if not FLAGS.preset:
        raise InputError(f"--preset is needed (or --config), of {', '.join(sae_jax.PRESETS)}")
    axes = {
        name: parse_axis(name, FLAGS[name].value, kinds[name]) for name in given if name in kinds
    }
    return {**axes, "seed": parse_axis("seeds", FLAGS.seeds or ["0"], (int,))}


def parse_axis(name: str, words: Sequence[str], kinds: Sequence[type]) -> list[Any]:
    """The values of flag --`name`, each the first of `kinds` that its word can be read as.

    Raises:
      InputError: there is none, or a word that is none of them.
    """
    if not words:
        raise InputError(f"--{name} is empty; give a comma list of values")
    return [_parse(name, word.strip(), kinds) for word in words]


def _parse(name: str, word: str, kinds: Sequence[type]) -> Any:
    if type(None) in kinds and word.lower() == "none":
        return None
    kinds = [kind for kind in kinds if kind is not type(None)]
    for kind in kinds:
        if kind is bool:
            if word.lower() in ("true", "false"):
                return word.lower() == "true"
            continue
        try:
            return kind(word)
        except ValueError:
            continue
    text = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    raise InputError(f"--{name}: {word!r} is not {' or '.join(text[kind] for kind in kinds)}")


def read_configs(axes: dict[str, list[Any]] | None, d_in: int) -> list[SAEConfig]:
    """What the flags, or the file of --config, ask for; duplicates merged."""
    if axes is None:
        configs = configs_from_file(Path(FLAGS.config), d_in)
    else:
        configs = [
            config
            for preset in FLAGS.preset
            for config in sae_jax.grid(preset.strip(), d_in=d_in, **axes)
        ]
    merged = list(dict.fromkeys(configs))
    if len(merged) < len(configs):
        logging.info("%d duplicates are merged", len(configs) - len(merged))
    return merged


def configs_from_file(path: Path, d_in: int) -> list[SAEConfig]:
    """Configurations of a JSON file: a list of them, or {"presets": {preset: axes}}."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--config: {path} cannot be read as JSON: {error}") from None
    configs = []
    try:
        if isinstance(found, list) and all(isinstance(fields, dict) for fields in found):
            for i, fields in enumerate(found):
                where = f"[{i}]"
                configs.append(SAEConfig.from_dict({"d_in": d_in, **fields}))
        else:
            where = ""
            for preset, axes in _presets(found).items():
                where = f" {preset}"
                unknown = sorted(set(axes) - set(axis_types()) - {"d_in", "seed"})
                if unknown:
                    raise InputError(f"there is no axis {', '.join(unknown)}")
                configs += sae_jax.grid(preset, **{"d_in": d_in, **axes})
    except InputError as error:
        raise InputError(f"{path}{where}: {error}") from None
    if not configs:
        raise InputError(f"{path} holds no configurations")
    for config in configs:
        if config.d_in != d_in:
            raise InputError(f"{path} says d_in={config.d_in}; the data has {d_in} dimensions")
        if not isinstance(config.name, str):
            raise InputError(f"{path}: name={config.name!r} must be text")
    return configs


def _presets(found: Any) -> dict[str, dict[str, Any]]:
    """Axes by preset, of what a file holds."""
    presets = found.get("presets") if isinstance(found, dict) and len(found) == 1 else None
    if not (isinstance(presets, dict) and all(isinstance(axes, dict) for axes in presets.values())):
        raise InputError('must be a list of configurations, or {"presets": {preset: {axis: [...]}}')
    return presets


def shard(
    configs: Sequence[SAEConfig], shards: int, index: int, rows: int, epochs: int
) -> list[SAEConfig]:
    """The configurations of one shard, in their order: together the shards are the whole, once.

    By estimated cost, n_latents * batch * steps, the longest first, each to the shard that has the
    least so far.
    """
    if index >= shards:
        raise InputError(f"--shard_index={index} must be less than --num_shards={shards}")
    if shards > len(configs):
        raise InputError(f"--num_shards={shards} is more than the {len(configs)} configurations")
    costs = [
        config.n_latents * config.batch_size * (epochs * (rows // config.batch_size))
        for config in configs
    ]
    loads, ours = [0] * shards, []
    for position in sorted(range(len(configs)), key=lambda i: (-costs[i], i)):
        lightest = loads.index(min(loads))
        loads[lightest] += costs[position]
        if lightest == index:
            ours.append(position)
    return [configs[position] for position in sorted(ours)]


def describe(configs: Sequence[SAEConfig]) -> str:
    """How many configurations and programs, and the values of every field that varies."""
    programs = len({config.architecture for config in configs})
    lines = [f"{len(configs)} configurations -> {programs} programs"]
    for preset in dict.fromkeys(config.name for config in configs):
        members = [config.to_dict() for config in configs if config.name == preset]
        lines.append(f"  {preset}: {len(members)}")
        for name in members[0]:
            values = [_text(value) for value in dict.fromkeys(member[name] for member in members)]
            if len(values) > 1:
                more = f", ... ({len(values)} values)" if len(values) > 12 else ""
                lines.append(f"    {name:<20} {', '.join(values[:12])}{more}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def best(results: pd.DataFrame, split: str) -> str:
    """The configurations that no other beats in both R² and L0: some of them, evenly, by L0."""
    l0, r2 = f"{split}_l0", f"{split}_r2"
    trained = results[results["status"] == "trained"].sort_values([l0, r2], ascending=[True, False])
    highest = trained[r2].cummax()
    front = trained[(trained[r2] == highest) & (highest > highest.shift(fill_value=-np.inf))]
    if front.empty:
        return "  none: every configuration diverged"
    some = np.unique(np.linspace(0, len(front) - 1, SHOWN).round().astype(int))
    fields = [field.name for field in dataclasses.fields(SAEConfig)]
    values = results.groupby("name")[fields].nunique(dropna=False).max()
    varied = [name for name in fields if values[name] > 1]  # within a preset
    table = front.iloc[some][["member", "name", *varied, l0, r2]].astype(object)
    return table.where(table.notna(), "").to_string(index=False, float_format="{:.4g}".format)


if __name__ == "__main__":
    cli.launch(main, define_flags)
