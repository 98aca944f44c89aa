r"""A full-size scGPT beside torch's own encoder, on the same weights and the same cells.

    python -m experiments.benchmarks.extraction --h5ad=zheng.h5ad --genes=symbol --vocab=vocab.json
                                                                       (about 12 minutes on 2 cores)
    python -m experiments.benchmarks.extraction --quick                            (about a minute)

12 blocks, 512 wide, 60,697 tokens, random weights in the authors' files. Equal lengths: a batch of
cells of as many genes. Real cells: in their order, padded to the longest of a batch, as the authors
do, against the reader's batches of like length. The peer is nn.TransformerEncoder in its fast path,
with and without nested tensors. Rounds alternate; medians. Both give the vector of <cls>, for which
the reader's last block needs one query, and then the mean over genes, for which it needs all. It
must show at least 1 x at equal lengths and 1.5 x on real cells. The peak memory is the reader's: it
is taken before a peer is made. Without --h5ad the cells are made up.
"""

import functools
import itertools
import json
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse
import torch
from absl import flags
from torch import nn

import extract
from experiments import cli
from extract.models.scgpt import Network, ScGPT
from extract.models.sequences import Sequences, pad, pool
from sae_jax import InputError

FLAGS = flags.FLAGS
ARGS = {"embsize": 512, "nheads": 8, "d_hid": 512, "nlayers": 12, "n_bins": 51}
SPECIAL = ("<pad>", "<cls>", "<eoc>")
TOKENS = 60_697
POOLINGS = ("cls", "mean")


def define_flags() -> None:
    """Defines the flags; `cli.launch` calls this."""
    flags.DEFINE_string("h5ad", None, "Real cells, raw counts; made-up ones if left out.")
    flags.DEFINE_string("genes", None, "Column of var with gene symbols (var_names).")
    flags.DEFINE_string("vocab", None, "A vocab.json of scGPT; needed with --h5ad.")
    flags.DEFINE_integer("cells", 64, "Cells of a round.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 16, "Cells of a batch.", lower_bound=1)
    flags.DEFINE_integer("length", 512, "Tokens of the cells of equal length.", lower_bound=2)
    flags.DEFINE_integer("rounds", 3, "Of each.", lower_bound=1)
    flags.DEFINE_string("device", "cpu", "cpu, cuda or auto.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of both.")
    flags.DEFINE_bool("quick", False, "2 blocks, few cells, one round.")


def main() -> None:
    """Measures and prints."""
    if FLAGS.h5ad and not FLAGS.vocab:
        raise InputError("--vocab is needed with --h5ad")
    args = ARGS | ({"nlayers": 2} if FLAGS.quick else {})
    count, rounds = (16, 1) if FLAGS.quick else (FLAGS.cells, FLAGS.rounds)
    names = list(json.loads(Path(FLAGS.vocab).read_text())) if FLAGS.vocab else []
    names += [f"gene{i}" for i in range(TOKENS - len(names) - len(SPECIAL))]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args, [*names, *SPECIAL])
        began = time.perf_counter()
        model = extract.load_model("scgpt", folder, device=FLAGS.device, dtype=FLAGS.dtype)
        print(f"read in {time.perf_counter() - began:.1f} s, on {model.device}, {FLAGS.dtype}")
    cells = made_up(names, count) if FLAGS.h5ad is None else real(count)
    inputs = model.plan(cells, FLAGS.genes, duplicates="sum", min_gene_coverage=0.0).read(
        slice(None)
    )
    random = np.random.default_rng(0)
    equal = Sequences(
        [random.integers(0, len(names), FLAGS.length) for _ in range(FLAGS.batch_size)],
        [random.integers(1, 51, FLAGS.length).astype(np.float32) for _ in range(FLAGS.batch_size)],
        1, 0, np.zeros(FLAGS.batch_size, bool),
    )  # fmt: skip
    sets = {"equal lengths": equal, "real cells": inputs}
    for some, pooling in itertools.product(sets.values(), POOLINGS):
        ours(model, some, pooling)  # also warms up
    print(peak_memory(model.device))
    torch_encoders = {
        "torch, padded": encoder(model, nested=False),
        "torch, nested": encoder(model, nested=True),
    }
    for (what, some), pooling in itertools.product(sets.items(), POOLINGS):
        lengths = some.lengths
        print(
            f"\n{what}, {pooling}: {len(lengths)} cells of {lengths.min()} .. {lengths.max()} "
            f"tokens, median {int(np.median(lengths))}, batches of {FLAGS.batch_size}"
        )
        jobs = {"ours": functools.partial(ours, model, some, pooling)}
        jobs |= {
            name: functools.partial(peer, model, net, some, pooling)
            for name, net in torch_encoders.items()
        }
        measure(jobs, rounds, len(lengths))


def peak_memory(device: torch.device) -> str:
    """Of this process so far, and of the device."""
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    text = f"peak memory {here:.2f} GiB"
    if device.type == "cuda":
        text += f", on the device {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return text


def measure(jobs: dict[str, Callable[[], np.ndarray]], rounds: int, cells: int) -> None:
    """Alternate the jobs; print cells a second, the ratio to ours, the largest difference."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    results = {}
    for _ in range(rounds):
        for name, job in jobs.items():
            began = time.perf_counter()
            results[name] = job()
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        middle = statistics.median(times)
        line = f"  {name:<14} {cells / middle:8.2f} cells/s"
        if name != "ours":
            ratio = statistics.median(b / a for a, b in zip(seconds["ours"], times, strict=True))
            off = np.abs(results[name] - results["ours"]).max()
            line += f"   ours is {ratio:.2f} x   largest difference {off:.1e}"
        print(line)


def ours(model: ScGPT, inputs: Sequences, pooling: str) -> np.ndarray:
    """The reader."""
    last = model.n_layers - 1
    return model.evaluate(inputs, [last], pooling, batch_size=FLAGS.batch_size).hidden[last]


def peer(model: ScGPT, net: nn.TransformerEncoder, inputs: Sequences, pooling: str) -> np.ndarray:
    """torch's encoder on batches of cells in their order, padded to the longest of each."""
    rows = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors being a prototype
        for start in range(0, len(inputs.ids), FLAGS.batch_size):
            some = inputs.take(np.arange(start, min(start + FLAGS.batch_size, len(inputs.ids))))
            batch = pad(some, model.pad_id, model.pad_value, model.device)
            hidden = model.network.encoder(batch.ids) + model.network.value_encoder(batch.values)
            pads = None if bool(batch.real.all()) else ~batch.real
            hidden = net(hidden, src_key_padding_mask=pads)
            rows.append(pool(hidden, batch, pooling).cpu().numpy())
    return np.concatenate(rows)


def encoder(model: ScGPT, *, nested: bool) -> nn.TransformerEncoder:
    """torch's own, of the model's weights."""
    args = model.args
    layer = nn.TransformerEncoderLayer(
        args["embsize"], args["nheads"], args["d_hid"], batch_first=True, dropout=0
    )
    net = nn.TransformerEncoder(layer, args["nlayers"], enable_nested_tensor=nested)
    net.load_state_dict(model.network.transformer_encoder.state_dict())
    return net.to(model.device, next(model.network.parameters()).dtype).eval()


def write(folder: Path, args: dict[str, int], tokens: list[str]) -> None:
    """A checkpoint of random weights in the authors' format."""
    torch.manual_seed(0)
    network = Network(len(tokens), args, ["mlm", "mvc"])
    for block in network.transformer_encoder.layers:
        nn.init.xavier_uniform_(block.self_attn.in_proj_weight)
        nn.init.zeros_(block.self_attn.in_proj_bias)
    torch.save(network.state_dict(), folder / "best_model.pt")
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(tokens)}))


def real(count: int) -> anndata.AnnData:
    """Some cells of the file, at random."""
    cells = anndata.read_h5ad(FLAGS.h5ad)
    chosen = np.random.default_rng(0).choice(cells.n_obs, min(count, cells.n_obs), replace=False)
    return cells[np.sort(chosen)].copy()


def made_up(names: list[str], count: int) -> anndata.AnnData:
    """Counts of 3000 genes, of cells of very different depth."""
    random = np.random.default_rng(0)
    depth = random.lognormal(0, 0.6, (count, 1))
    counts = random.poisson(depth * random.gamma(0.3, 0.6, 3000))
    cells = anndata.AnnData(scipy.sparse.csr_matrix(counts.astype(np.float32)))
    cells.var_names = names[:3000]
    return cells


if __name__ == "__main__":
    cli.launch(main, define_flags)
