"""Bytes to be read: any, and those of a valid file changed here and there."""

import hypothesis.strategies as st

PIECES = (
    b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff\xff\xff\xff\xff", b"-1", b"1e999", b"NaN",
    b"null", b"[", b"]", b"{", b'"', b"\t", b"\n", b",", b"\r\n", b"\xef\xbb\xbf", b"9" * 30,
    b"../..", b"\x1b[2J",
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file after one to four changes: bits flipped, parts cut, doubled, moved, put in."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, len(content)))
        last = min(len(content), first + draw(st.integers(0, 40)))
        part = bytes(content[first:last])
        kind = draw(st.sampled_from(("flip", "cut", "double", "move", "put", "any", "end")))
        if kind == "flip" and first < len(content):
            content[first] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[first:last]
        elif kind == "double":
            content[first:first] = part
        elif kind == "move":
            del content[first:last]
            place = draw(st.integers(0, len(content)))
            content[place:place] = part
        elif kind == "put":
            content[first:last] = draw(st.sampled_from(PIECES))
        elif kind == "any":
            content[first:last] = draw(st.binary(max_size=12))
        else:
            del content[first:]
    return bytes(content)


def contents(valid: bytes) -> st.SearchStrategy[bytes]:
    """Mostly changed valid bytes, sometimes any."""
    return st.one_of(mutated(valid), mutated(valid), mutated(valid), st.binary(max_size=200))
