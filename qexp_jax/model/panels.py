"""Random projections of lists of arrays, made again from their keys and never stored: what both kinds share.

`w -> P w` as arrays of given shapes, and its exact adjoint, panel by panel: beside argument and result they hold one
panel of about `PANEL` numbers, whatever d is.

    count_sketch      orthonormal columns, O(d) time
    gaussian_sketch   iid normal entries, O(k d) time: k d random numbers a call
"""

from typing import TypeAlias

import numpy as np

PANEL = 2**18

Shapes: TypeAlias = tuple[tuple[int, ...], ...]


def size_of(shapes: Shapes) -> int:
    """d, the number of coordinates."""
    return sum(int(np.prod(shape)) for shape in shapes)


def sizes_and_offsets(shapes: Shapes) -> list[tuple[int, int]]:
    """(size, offset) of each array among the d coordinates."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    return list(zip(sizes, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
