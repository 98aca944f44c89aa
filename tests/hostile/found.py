"""Bytes that a reader once could not stand, each by what was wrong; `tests/fuzz.py` found them."""

import struct

# Reader, file, the content -> by what went wrong.
FOUND: dict[str, tuple[str, str, bytes]] = {
    "an .npy header that tokenize gives up on": (
        "rows (.npy)", "rows.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 5000) + b"(" * 5000,
    ),
    "an .npy header of 2 GiB": (
        "rows (.npy)", "rows.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{",
    ),
    "a number of 5000 digits, which Python does not read": (
        "from_pretrained (SAELens)", "d/cfg.json", b'{"d_in": ' + b"9" * 5000 + b"}",
    ),
    "100,000 lists in each other": (
        "from_pretrained (dictionary_learning)", "config.json", b"[" * 100_000,
    ),
    "tag-value pairs that obonet prints with their line end": (
        "ontology (OBO)", "go.obo", b"format-version 1.2\n",
    ),
    "more columns than pandas expects": (
        "multidgd", "small_obs.csv", b"cell,train_val_test\na,train,b\n",
    ),
    "half of a character in a name, which no table holds": (
        "configurations (JSON, list)", "c.json", b'[{"n_latents": 6, "name": "\\ud800"}]',
    ),
    "a secret that is no hexadecimal": ("browser's secret", "secret", b"\xff" * 64),
}  # fmt: skip
