"""The console script `sae-jax`, and how every program of this package starts.

A program is a module with `main()` and `define_flags()`; one with ARGUMENTS, the name of what its
command takes beside flags, gets that: `main(arguments)`. Flags are not defined when a module is
imported: absl has one set of them a process, where two programs cannot both define --workdir.
"""

import ctypes
import importlib
import logging as python_logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging

from extract.errors import InputError as ExtractionError
from sae_jax import InputError, disk

PROGRAMS = {
    "quickstart": "cells and an embedding in; named features, tables, figures and a report out",
    "train": "an embedding and one configuration in; a dictionary and its metrics out",
    "lens": "a dictionary, cells and gene sets in; every feature annotated, with nulls, out",
    "lens-compare": "finished runs of the lens in; features matched, shared terms, seeds out",
    "programs": "layers of a model and cells in; types, genes and marker sets of features out",
    "steer": "a dictionary, cells and a decoder in; what turning features up does, out",
    "concepts": "cells and a model in; concepts, their genes, terms, stability and use out",
    "sweep": "an embedding in; a dictionary per configuration, their metrics and frontier out",
    "merge": "the shards of a sweep in; one run out, or the commands of those that are missing",
    "launch": "train or sweep as several processes, on one machine or many; who is lost is named",
    "verify": "folders that any of these left in; whether every byte is as it was, out",
    "browse": "folders of the lens or of concepts in; pages to explore them, or an expert study",
}
MODULES = {  # whose names differ
    "lens": "feature_lens",
    "lens-compare": "feature_lens_compare",
    "programs": "cell_type_programs",
    "steer": "steering",
}


def main() -> None:
    """`sae-jax PROGRAM --flags`: the same as `python -m experiments.PROGRAM`, from any folder."""
    program = sys.argv[1] if len(sys.argv) > 1 else ""
    if program not in PROGRAMS:
        lines = [f"  {name:<12} {what}" for name, what in PROGRAMS.items()]
        lines += [
            "flags of a program: sae-jax PROGRAM --help",
            "a program of its own extracts embeddings from foundation models: sae-jax-extract",
        ]
        asked = program in ("-h", "--help", "--helpfull")
        out = sys.stdout if asked else sys.stderr
        print("usage: sae-jax PROGRAM [--flags]", *lines, sep="\n", file=out)
        sys.exit(0 if asked else 2)
    try:
        module = importlib.import_module(f"experiments.{MODULES.get(program, program)}")
    except ModuleNotFoundError as error:
        print(
            f"error: {program} needs {error.name}, of an optional extra (README, Start)",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.modules["__main__"].__doc__ = module.__doc__  # what --help prints
    arguments = getattr(module, "ARGUMENTS", None)
    launch(module.main, module.define_flags, [f"sae-jax {program}", *sys.argv[2:]], arguments)


def launch(
    program: Callable[..., None],
    define_flags: Callable[[], None],
    argv: Sequence[str] | None = None,
    arguments: str | None = None,
) -> None:
    """Run an absl program: plain log lines, all CPU cores, and one line for bad input (exit
    2) and for a disk that is full, read-only or gone (exit 1).

    arguments: what the program takes beside flags, if anything; it is called with the list.
    """
    before = set(flags.FLAGS)
    define_flags()
    for name in set(flags.FLAGS) - before:  # of the main module: --help shows them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def parse(arguments: Sequence[str]) -> list[str]:
        try:
            return flags.FLAGS(arguments)
        except flags.Error as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except SystemExit:  # of --help, which absl ends with 1
            sys.exit(0)

    def run(given: Sequence[str]) -> None:
        if len(given) > 1 and arguments is None:
            print(f"error: unexpected arguments: {' '.join(given[1:])}", file=sys.stderr)
            sys.exit(2)
        logging.set_verbosity(logging.INFO)
        logging.get_absl_handler().setFormatter(None)
        # Orbax logs through absl as well, a dozen lines for each checkpoint.
        logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
        for chatty in ("jax", "anndata"):
            python_logging.getLogger(chatty).setLevel(python_logging.WARNING)
        _few_arenas()
        try:
            if arguments is None:
                _prepare_jax()
                program()
            else:
                program(list(given[1:]))
        except (InputError, ExtractionError) as error:
            _close_bars()
            print(f"error: {error}", file=sys.stderr)
            _leave(2)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            _leave(130)
            sys.exit(130)
        except Exception as error:  # of a full disk each library makes another kind
            if (told := disk.message(error, _filled())) is None:
                _leave(1, trace=True)
                raise
            _close_bars()
            print(f"error: {told}", file=sys.stderr)
            _leave(1)
            sys.exit(1)

    app.run(run, argv=None if argv is None else list(argv), flags_parser=parse)


def _close_bars() -> None:
    """A message begins a line of its own, not that of a bar which an error left half drawn."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def _leave(status: int, trace: bool = False) -> None:
    """Of several processes: without waiting for the others."""
    if "sae_jax.distributed" in sys.modules:
        sys.modules["sae_jax.distributed"].leave(status, trace)


def _filled() -> Path:
    """The folder that the program writes to, as far as it is told by a flag."""
    given = flags.FLAGS.flag_values_dict()
    named = (given.get(name) for name in ("workdir", "output", "export", "state"))
    return Path(next(filter(None, named), "."))


def _prepare_jax() -> None:
    """Only of programs that compute: who only reads results does not load JAX."""
    from sae_jax import distributed

    distributed.use_all_cpu_cores()
    distributed.use_compilation_cache()


def _few_arenas() -> None:
    """Threads share two heaps of glibc's, instead of keeping what they freed in one each: half the
    peak memory where threads work on large blocks in turn (the lens, 8.9 to 4.3 GiB)."""
    try:
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX
    except (AttributeError, OSError, TypeError):
        return  # another C library
