"""Some of all combinations, chosen so that little is missed."""

import itertools


def covering(rows: list[tuple[str, ...]], strength: int) -> list[tuple[str, ...]]:
    """Some of the rows, in which every `strength` values meet that meet in any: greedily."""
    parts = {row: set(itertools.combinations(enumerate(row), strength)) for row in rows}
    left, chosen = set().union(*parts.values()), []
    while left:
        chosen.append(max(rows, key=lambda row: len(parts[row] & left)))
        left -= parts[chosen[-1]]
    return chosen
