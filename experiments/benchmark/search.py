"""Choosing a baseline's hyperparameters: pattern search on an unbounded lattice, with a cache of what was scored."""

from collections.abc import Callable, Iterable

Point = tuple[int, ...]


def climb(score: Callable[[Point], float], starts: Iterable[Point], allowed: Callable[[Point], bool]) -> Point:
    """The point from which no allowed neighbour (one step along one axis) scores higher, from the best start.

    The lattice has no edges but those of `allowed`, so that the result beats all its neighbours by construction: wide
    grids without wide sweeps.

    >>> climb(lambda p: -abs(p[0] - 3) - abs(p[1] + 2), [(0, 0)], lambda p: True)
    (3, -2)
    """
    scores: dict[Point, float] = {}

    def cached(point: Point) -> float:
        if point not in scores:
            scores[point] = score(point)
        return scores[point]

    best = max((point for point in starts if allowed(point)), key=cached)
    while True:
        neighbours = [point for point in _neighbours(best) if allowed(point)]
        better = max(neighbours, key=cached, default=best)
        if cached(better) <= cached(best):
            return best
        best = better


def _neighbours(point: Point) -> list[Point]:
    return [
        (*point[:axis], value + step, *point[axis + 1 :]) for axis, value in enumerate(point) for step in (-1, 1)
    ]  # fmt: skip
