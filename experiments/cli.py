"""The console script `sae-jax`, and how every program of this package starts."""

import importlib
import logging as python_logging
import sys
from collections.abc import Callable, Sequence

from absl import app, logging

from sae_jax import InputError, distributed

PROGRAMS = {
    "quickstart": "cells and an embedding in; named features, tables, figures and a report out",
}


def main() -> None:
    """`sae-jax PROGRAM --flags`: the same as `python -m experiments.PROGRAM`, from any folder."""
    program = sys.argv[1] if len(sys.argv) > 1 else ""
    if program not in PROGRAMS:
        lines = [f"  {name:<12} {what}" for name, what in PROGRAMS.items()]
        print("usage: sae-jax PROGRAM [--flags]", *lines, sep="\n", file=sys.stderr)
        print("flags of a program: sae-jax PROGRAM --help", file=sys.stderr)
        sys.exit(0 if program in ("-h", "--help", "--helpfull") else 2)
    module = importlib.import_module(f"experiments.{program}")
    launch(module.main, [f"sae-jax {program}", *sys.argv[2:]])


def launch(program: Callable[[], None], argv: Sequence[str] | None = None) -> None:
    """Run an absl program: plain log lines, all CPU cores, and bad input as one line and exit 2."""

    def run(arguments: Sequence[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"unexpected arguments: {' '.join(arguments[1:])}")
        logging.set_verbosity(logging.INFO)
        logging.get_absl_handler().setFormatter(None)
        for chatty in ("jax", "anndata"):
            python_logging.getLogger(chatty).setLevel(python_logging.WARNING)
        distributed.use_all_cpu_cores()
        try:
            program()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(run, argv=None if argv is None else list(argv))
