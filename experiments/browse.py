r"""Concept browser: pages to explore what was found, and an expert's blinded study of it.

    sae-jax browse runs/lens runs/concepts --gene_info=Homo_sapiens.gene_info.gz
    sae-jax browse runs/lens --export=lens_pages --columns=cell_type,donor
    sae-jax browse runs/concepts --new_study=pbmc --concepts=40 --neurons=40 --raters=ann,bob

Folders of `sae-jax lens`, `concepts` or `quickstart`, of one dictionary and the same cells where
there are several. They are only read; the index of a first look (seconds) and what people write
lie in --state. The server listens on this machine alone; from another one:
`ssh -L 8080:localhost:8080 host`. On --host=0.0.0.0, or where --state holds a study, the link that
it prints has a token, without which it shows nothing but the study to its raters.

--export writes the pages without a server, read-only: every document is a script, so they open from
the file system. It has no answers and no tokens of a study, and publishes the columns of obs that
--columns names. --new_study draws concepts and neurons, mixed and without names, with some of them
twice (Claye et al., section 3.3 and appendix D); each rater gets a link. Progress, answers and
agreement are on the page "Study".
"""

import glob
import logging as python_logging
import secrets
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging

from analysis.browser.study_panels import PANELS
from experiments import cli, verify
from sae_jax import InputError, files

if TYPE_CHECKING:
    from analysis.browser.run import Run

FLAGS = flags.FLAGS

ARGUMENTS = "RUNDIR ..."
LOOPBACK = ("127.0.0.1", "localhost")


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("state", None, "Of index and studies; default: RUNDIR/.browser.")
    flags.DEFINE_string("gene_info", None, "NCBI's gene_info: aliases and descriptions.")
    flags.DEFINE_string("host", "127.0.0.1", "To listen on; 0.0.0.0: all, by a token.")
    flags.DEFINE_integer("port", 8080, "Port; 0: a free one.", 0, 65535)
    flags.DEFINE_list("allow_host", [], "Further names by which this server may be called.")
    flags.DEFINE_string("export", None, "New folder for pages that need no server.")
    flags.DEFINE_list("columns", None, "Columns of obs to show and to publish; default: all.")
    flags.DEFINE_string("new_study", None, "Name of a study to make.")
    flags.DEFINE_string(
        "new_links", None, "Name of a study whose --raters need new links; their old ones end."
    )
    flags.DEFINE_string("title", None, "What raters read above the study; default: its name.")
    flags.DEFINE_integer("concepts", 40, "Concepts in it.", 1)
    flags.DEFINE_integer("neurons", 40, "Neurons in it.", 0)
    flags.DEFINE_integer("repeats", 8, "Items that come twice.", 0)
    flags.DEFINE_list("raters", None, "Names of those who answer.")
    flags.DEFINE_list(
        "panels", None, f"What an item shows, of {','.join(PANELS)}; default: all that it may."
    )
    flags.DEFINE_integer("seed", 0, "Of the draw.", 0)
    verify.define_flag()


def main(folders: list[str]) -> None:
    """Runs the program by its flags."""
    if not folders:
        raise InputError("give the folder of a run: sae-jax browse RUNDIR")
    try:
        from analysis.browser import safety
        from analysis.browser.run import Run
    except ModuleNotFoundError as error:
        raise InputError(f"{error}: pip install 'sae-jax[browser]'") from None
    paths = [Path(folder) for folder in folders]
    if missing := [path for path in paths if not path.is_dir()]:
        raise InputError(f"{missing[0]} is no folder")
    verify.inputs(*paths)
    if FLAGS.export:
        check_export(Path(FLAGS.export))
    state = safety.check_state(Path(FLAGS.state) if FLAGS.state else default_state(paths[0]))
    gene_info = None if FLAGS.gene_info is None else Path(FLAGS.gene_info)
    hidden = {} if FLAGS.columns is None else {"columns": FLAGS.columns}
    run = Run.open(paths, state, gene_info, **hidden)
    if FLAGS.export:
        from analysis.browser import export

        export.write(run, Path(FLAGS.export))
    elif FLAGS.new_study:
        new_study(run, state, folders)
    elif FLAGS.new_links:
        new_links(state, folders)
    else:
        serve(run, state)


def default_state(folder: Path) -> Path:
    """Hidden in the run's folder, so that the run's program may fill that again."""
    return folder / ".browser"


def check_export(out: Path) -> None:
    """Refuse a folder that holds anything; clear what a killed export of the same name left."""
    files.check_writable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--export={out} is there already: give a new folder")
    for leftover in out.parent.glob(f"{files.ASIDE}{glob.escape(out.name)}.*"):
        files.remove(leftover)


def new_study(run: "Run", state: Path, folders: list[str]) -> None:
    """Draws a study and prints the raters' tokens, which are nowhere else."""
    from analysis.browser import study

    more = {} if FLAGS.panels is None else {"panels": tuple(FLAGS.panels)}
    more |= {} if FLAGS.title is None else {"title": FLAGS.title}
    links = study.create(
        state, run, FLAGS.new_study, concepts=FLAGS.concepts, neurons=FLAGS.neurons,
        repeats=FLAGS.repeats, raters=FLAGS.raters or ["rater"], seed=FLAGS.seed, **more,
    )  # fmt: skip
    tell_links(FLAGS.new_study, links, folders)


def new_links(state: Path, folders: list[str]) -> None:
    """Prints new links of raters who lost theirs, or never saw them."""
    from analysis.browser import study

    if not FLAGS.raters:
        raise InputError(f"--new_links={FLAGS.new_links}: say whose, by --raters")
    links = [(rater, study.new_token(state, FLAGS.new_links, rater)) for rater in FLAGS.raters]
    tell_links(FLAGS.new_links, links, folders)


def tell_links(name: str, links: list[tuple[str, str]], folders: list[str]) -> None:
    """Prints the raters' tokens, of which only hashes are kept."""
    started = " ".join(["sae-jax browse", *map(str, folders)])
    print(f"study {name}: start `{started}` anew with the same --state, --host and --port,")
    print("and give each rater this link alone")
    for rater, token in links:
        print(f"  {rater:<12} http://{called()}:{FLAGS.port}/study/enter#{token}")


def called() -> str:
    """The name by which others reach this server."""
    return "localhost" if FLAGS.host in LOOPBACK else socket.gethostname()


def serve(run: "Run", state: Path) -> None:
    """Serves until it is stopped."""
    import uvicorn

    from analysis.browser import app, study

    # A rater at the same machine must not find the features' names by leaving the study.
    guarded = FLAGS.host not in LOOPBACK or study.load_all(state)
    token = secrets.token_urlsafe(24) if guarded else None
    served = app.create(
        run, state, host=FLAGS.host, allow=(*FLAGS.allow_host, called()), token=token
    )
    listening = bound(FLAGS.host, FLAGS.port)
    port = listening.getsockname()[1]
    way = "" if token is None else f"enter#{token}"
    print(f"http://{called()}:{port}/{way}   (Ctrl-C ends it)", flush=True)
    if FLAGS.host not in LOOPBACK:
        print("What is typed and shown crosses the network unencrypted: prefer an ssh tunnel.")
    python_logging.getLogger("uvicorn.error").setLevel(python_logging.WARNING)
    uvicorn.Server(uvicorn.Config(served, log_level="warning", access_log=False)).run(
        sockets=[listening]
    )
    logging.info("ended")


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
      InputError: the port is in use, or the address is not of this machine.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise InputError(
            f"--host={host} --port={port}: {error.strerror or error}; --port=0 takes a free one"
        ) from None


if __name__ == "__main__":
    cli.launch(main, define_flags, arguments=ARGUMENTS)
