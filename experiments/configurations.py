r"""Configurations out of flags or a file: every field of SAEConfig a flag, its comma list an axis.

A file, of --config, is JSON or YAML: a list of configurations (fields of SAEConfig; d_in is that
of the data), or axes by preset:

    {"presets": {"vanilla": {"n_latents": [40, 400], "l1_weight": [0.1, 1], "seed": [0, 1]}}}

or Python (.py, which is run): `configs`, a list of SAEConfig, or a function of d_in that returns
one.
"""

import dataclasses
import math
import runpy
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

import sae_jax
from sae_jax import InputError, SAEConfig
from sae_jax.errors import MOST, brief, counted
from sae_jax.reading import check_file, read_json, reading

FLAGS = flags.FLAGS

SCALARS = (int, float, str, bool)
MOST_CONFIGS = 10**6
LARGEST_YAML = 2**20  # characters; PyYAML takes a second for some 10^5


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
    """--preset, --config, --seeds, and a flag for every axis."""
    flags.DEFINE_list("preset", None, f"Of {', '.join(sae_jax.PRESETS)}; a comma list.")
    flags.DEFINE_string(
        "config", None, "JSON, YAML or Python file of configurations, instead of presets and axes."
    )
    flags.DEFINE_list("seeds", None, "Of the initialisation; a comma list (default 0).")
    defaults = {field.name: field.default for field in dataclasses.fields(SAEConfig)}
    for name, kinds in axis_types().items():
        text = " or ".join("none" if kind is type(None) else kind.__name__ for kind in kinds)
        default = defaults.get(name, dataclasses.MISSING)
        known = (
            "" if default in (None, dataclasses.MISSING) else f", else {default} or the preset's"
        )
        flags.DEFINE_list(name, None, f"Axis: {text}{known}.")


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
    """Configurations of a file; see the module."""
    found = _run(path, d_in) if path.suffix == ".py" else _parsed(path)
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
                several = [len(values) for values in axes.values() if isinstance(values, list)]
                if math.prod(several) > MOST_CONFIGS:
                    raise InputError(f"it asks for {math.prod(several):,} configurations")
                configs += sae_jax.grid(preset, **{"d_in": d_in, **axes})
    except Exception as error:  # a value may be anything
        raise InputError(f"{path}{where}: {brief(error, MOST)}") from None
    if not configs:
        raise InputError(f"{path} holds no configurations")
    for config in configs:
        if config.d_in != d_in:
            raise InputError(f"{path} says d_in={config.d_in}; the data has {d_in} dimensions")
    return configs


def _parsed(path: Path) -> Any:
    """What a JSON or YAML file holds."""
    if path.suffix not in (".yaml", ".yml"):
        return read_json(path)
    import yaml

    with reading(path, "cannot be read as YAML"):
        text = check_file(path).read_bytes().decode()
        if len(text) > LARGEST_YAML:
            raise ValueError(f"{len(text):,} characters are too many for configurations")
        # An alias may stand for itself, or a few lines for billions.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of C where there is one
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise ValueError("aliases (*name) are not supported")
        return _numbers(yaml.load(text, loader))


def _numbers(value: Any) -> Any:
    """With numbers where YAML 1.1 sees text: 1e-3, which it wants written 1.0e-3."""
    if isinstance(value, dict):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{strange[0]!r} is no name of a field")
        return {key: _numbers(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_numbers(inside) for inside in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _run(path: Path, d_in: int) -> Any:
    """`configs` of a Python file, as dictionaries."""
    if not path.is_file():
        raise InputError(f"--config: there is no file {path}")
    try:
        configs = runpy.run_path(str(path)).get("configs")
        configs = configs(d_in) if callable(configs) else configs
    except (Exception, SystemExit) as error:  # anything at all: it is somebody's program
        reason = f"{type(error).__name__}: {brief(error)}"
        raise InputError(f"--config: {path} failed: {reason}") from error
    if not (isinstance(configs, list) and all(isinstance(c, SAEConfig) for c in configs)):
        raise InputError(
            f"--config: {path} must define `configs`, a list of SAEConfig or a function of d_in "
            "that returns one"
        )
    return [config.to_dict() for config in configs]


def _presets(found: Any) -> dict[str, dict[str, Any]]:
    """Axes by preset, of what a file holds."""
    presets = found.get("presets") if isinstance(found, dict) and len(found) == 1 else None
    if not (isinstance(presets, dict) and all(isinstance(axes, dict) for axes in presets.values())):
        raise InputError('must be a list of configurations, or {"presets": {preset: {axis: [...]}}')
    return presets


def describe(configs: Sequence[SAEConfig]) -> str:
    """How many configurations and programs, and the values of every field that varies."""
    programs = len({config.architecture for config in configs})
    lines = [f"{counted(len(configs), 'configuration')} -> {counted(programs, 'program')}"]
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
