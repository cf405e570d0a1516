"""Which leaves of a parameter pytree are tuned, and in what precision they are worked on.

Everything that a compiled program has to know of the parameters but their numbers: a `Layout` is static and hashable,
so that equal models share one program.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Static description of a params pytree and of the leaves that are tuned; hashable.

    Attributes:
      treedef: its structure.
      shapes: of all leaves.
      dtypes: of all leaves, as they were given.
      tuned: for each leaf whether it is.
      dtype: in which the tuned ones are worked on.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    tuned: tuple[bool, ...]
    dtype: np.dtype

    @property
    def tuned_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tuned leaves, in tree order."""
        return tuple(s for s, t in zip(self.shapes, self.tuned, strict=True) if t)

    @property
    def num_params(self) -> int:
        """d, the number of tuned parameters."""
        return sum(int(np.prod(s)) for s in self.tuned_shapes)


def layout_of(params: Params, where: str | None = None) -> Layout:
    """The static layout of `params`, tuning the leaves whose path matches the regular expression `where`.

    A path joins its keys with `/`, for instance `params/Dense_0/bias`. Parameters are worked on in float32, or float64
    where they are float64.

    Raises:
      ValueError: if no leaf matches, or a tuned leaf is not a real floating-point array.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    tuned = tuple(where is None or re.search(where, name) is not None for name in names)
    if not any(tuned):
        raise ValueError(f"No parameter matches {where=}; the paths are {names}.")
    shapes = tuple(tuple(np.shape(leaf)) for _, leaf in paths)
    dtypes = tuple(jnp.result_type(leaf) for _, leaf in paths)
    for name, shape, dtype, is_tuned in zip(names, shapes, dtypes, tuned, strict=True):
        if is_tuned and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"Only real floating-point leaves can be tuned, found {name} of {dtype=}, {shape=}.")
    # At least float32: half precision would round away a step that is small beside its parameter.
    tuned_dtypes = [dtype for dtype, is_tuned in zip(dtypes, tuned, strict=True) if is_tuned]
    work = functools.reduce(jnp.promote_types, tuned_dtypes, jnp.float32)
    return Layout(treedef=treedef, shapes=shapes, dtypes=dtypes, tuned=tuned, dtype=np.dtype(work))


def leaf_names(layout: Layout) -> list[str]:
    """The paths of all leaves, keys joined with `/`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(jax.tree.unflatten(layout.treedef, layout.tuned))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def without_still_leaves(layout: Layout, moves: tuple[bool, ...]) -> Layout:
    """The layout that tunes only those of its tuned leaves that move; `moves` has an entry for each of them.

    Raises:
      ValueError: if none does.
    """
    if not any(moves):
        raise ValueError("Expected a loss that depends on parameters that are tuned, found a gradient that is zero.")
    each = iter(moves)
    # `and` takes the next entry for tuned leaves only.
    tuned = tuple(is_tuned and next(each) for is_tuned in layout.tuned)
    return dataclasses.replace(layout, tuned=tuned)


def tuned_leaves(layout: Layout, params: Params) -> list[jax.Array]:
    """The leaves that are tuned, in the working precision."""
    leaves = jax.tree.leaves(params)
    return [jnp.asarray(x, layout.dtype) for x, tuned in zip(leaves, layout.tuned, strict=True) if tuned]


def with_tuned_leaves(layout: Layout, params: Params, leaves: list[jax.Array]) -> Params:
    """`params` with its tuned leaves replaced, the others untouched."""
    new = iter(leaves)
    old = jax.tree.leaves(params)
    replaced = [next(new) if is_tuned else x for x, is_tuned in zip(old, layout.tuned, strict=True)]
    return jax.tree.unflatten(layout.treedef, replaced)


def working(layout: Layout, params: Params) -> Params:
    """The parameters with tuned leaves in the working precision, float32 for half-precision leaves."""
    return with_tuned_leaves(layout, params, tuned_leaves(layout, params))
