"""Public subspaces of the parameters: `theta = theta0 + P w` with `P` in R^{d x k}.

`lift` maps w in R^k to a displacement of the parameters, `project` is its exact adjoint and maps a gradient to
R^k. Both are pure functions of a `Subspace`, a pytree that passes through `jit`, `vmap` and `shard_map`; equal
constructors on equal shapes share one compiled program. The subspace must be public: chosen from the
pretrained parameters, public records or a key, never from private data.

    full(params)                the identity on all of R^d
    full(params, where=regex)   selected leaves: the last layer, biases, LoRA factors
    gaussian                    random directions, stored or made again from the key
    orthonormal                 a uniformly random subspace, (k, d) numbers stored
    count_sketch                orthonormal columns, O(d) time, nothing stored
    span                        given directions
    compose(outer, basis)       directions inside another subspace; `where` composes with all of the above
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import Params
from qexp_jax.model import sketching
from qexp_jax.model.factored_gradients import Outer, Rows
from qexp_jax.privacy.subspace_names import BASE_NAME, DIRECTIONS, TOP

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Static description of a params pytree and of the leaves that are tuned; hashable."""

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


class _Operator(NamedTuple):
    """A lift on tuned leaves and its adjoint, as functions of (layout, arrays, argument) that compare equal where they
    are; P^T P, where there is a way cheaper than k lifts; and the adjoint on `Rows`, where it need not form gradients.
    """

    lift: Callable[[Layout, Any, jax.Array], list[jax.Array]]
    project: Callable[[Layout, Any, list[jax.Array]], jax.Array]
    gram: Callable[[Layout, Any], jax.Array] | None = None
    project_rows: Callable[[Layout, Any, Rows], jax.Array] | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["dim", "layout", "operator", "orthonormal", "name"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Subspace:
    """A public subspace; use it through `lift`, `project`, `displace` and `gram`.

    Attributes:
      dim: k.
      layout: the parameters it belongs to.
      operator: the pair of functions on tuned leaves.
      orthonormal: whether P^T P is the identity by construction.
      name: what it is; the certificate holds its `certified_name`.
      arrays: its numbers (a basis, a key), a pytree.
    """

    dim: int
    layout: Layout
    operator: _Operator
    orthonormal: bool
    name: str
    arrays: Any


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
    work = functools.reduce(jnp.promote_types, [t for t, f in zip(dtypes, tuned, strict=True) if f], jnp.float32)
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
    return dataclasses.replace(layout, tuned=tuple(t and next(each) for t in layout.tuned))


def lift(subspace: Subspace, w: jax.Array) -> Params:
    """P w: from (k,) to a displacement with the structure of the parameters, zero on leaves that are not tuned."""
    tuned = iter(subspace.operator.lift(subspace.layout, subspace.arrays, w))
    layout = subspace.layout
    leaves = [
        next(tuned) if is_tuned else jnp.zeros(shape, dtype)
        for shape, dtype, is_tuned in zip(layout.shapes, layout.dtypes, layout.tuned, strict=True)
    ]
    return jax.tree.unflatten(layout.treedef, leaves)


def project(subspace: Subspace, params: Params) -> jax.Array:
    """P^T g: from a pytree like the parameters to (k,); the exact adjoint of `lift`."""
    return subspace.operator.project(subspace.layout, subspace.arrays, tuned_leaves(subspace.layout, params))


def tuned_leaves(layout: Layout, params: Params) -> list[jax.Array]:
    """The leaves that are tuned, in the working precision."""
    leaves = jax.tree.leaves(params)
    return [jnp.asarray(x, layout.dtype) for x, tuned in zip(leaves, layout.tuned, strict=True) if tuned]


def with_tuned_leaves(layout: Layout, params: Params, leaves: list[jax.Array]) -> Params:
    """`params` with its tuned leaves replaced, the others untouched."""
    new = iter(leaves)
    old = jax.tree.leaves(params)
    return jax.tree.unflatten(
        layout.treedef, [next(new) if tuned else x for x, tuned in zip(old, layout.tuned, strict=True)]
    )


def working(layout: Layout, params: Params) -> Params:
    """The parameters with tuned leaves in the working precision, float32 for half-precision leaves."""
    return with_tuned_leaves(layout, params, tuned_leaves(layout, params))


def displace(subspace: Subspace, params: Params, w: jax.Array) -> Params:
    """theta + P w in the working precision; leaves that are not tuned stay as they are."""
    layout = subspace.layout
    steps = subspace.operator.lift(layout, subspace.arrays, w)
    return with_tuned_leaves(
        layout, params, [x + step for x, step in zip(tuned_leaves(layout, params), steps, strict=True)]
    )


def gram(subspace: Subspace) -> jax.Array:
    """P^T P (k, k): the identity where the columns are orthonormal, else by default k lifts and projections."""
    eye = jnp.eye(subspace.dim, dtype=subspace.layout.dtype)
    if subspace.orthonormal:
        return eye
    if subspace.operator.gram is not None:
        return subspace.operator.gram(subspace.layout, subspace.arrays)
    columns = jax.lax.map(lambda e: project(subspace, lift(subspace, e)), eye)
    return (columns + columns.T) / 2


def _check_dim(layout: Layout, dim: int) -> None:
    if not 1 <= dim <= layout.num_params:
        raise ValueError(f"Expected a subspace dimension in [1, {layout.num_params}], found {dim=}.")


# --- the whole space of the tuned leaves ---


def _split(layout, _, w):
    sizes = [int(np.prod(s)) for s in layout.tuned_shapes]
    parts = jnp.split(w, np.cumsum(sizes)[:-1])
    return [x.reshape(s) for x, s in zip(parts, layout.tuned_shapes, strict=True)]


def _concatenate(layout, _, leaves):
    return jnp.concatenate([x.ravel() for x in leaves])


_WHOLE = _Operator(_split, _concatenate)


def is_whole(subspace: Subspace) -> bool:
    """Whether its coordinates are those of the tuned leaves, one after the other."""
    return subspace.operator in (_WHOLE, _HELD_IN_PART)


# --- the same, but for coordinates that stay where they are ---


def _where_moved(moved, x):
    """A leaf, zero where it is held; `moved` is an array like it, or the rows and columns of a matrix that move."""
    if isinstance(moved, Outer):
        return jnp.where(moved.left[:, None] & moved.right, x, 0)
    return jnp.where(moved.reshape(x.shape), x, 0)


def _moved_split(layout, moved, w):
    return [_where_moved(m, x) for m, x in zip(moved, _split(layout, None, w), strict=True)]


def _moved_concatenate(layout, moved, leaves):
    return _concatenate(layout, None, [_where_moved(m, x) for m, x in zip(moved, leaves, strict=True)])


_HELD_IN_PART = _Operator(_moved_split, _moved_concatenate)


def holding(subspace: Subspace, moved: Rows) -> Subspace:
    """A whole space of which some coordinates are held: gradients have no part there, and no step goes there.

    Args:
      subspace: whole.
      moved: for each tuned leaf bools, flat; or an `Outer` of those of a matrix's rows and columns.
    """
    return dataclasses.replace(subspace, operator=_HELD_IN_PART, arrays=moved)


def num_moved(subspace: Subspace) -> int:
    """How many of its coordinates are not held; on the host."""
    if subspace.operator != _HELD_IN_PART:
        return subspace.dim
    return sum(math.prod(int(np.sum(x)) for x in jax.tree.leaves(m)) for m in subspace.arrays)


def without_held(subspace: Subspace, x: jax.Array) -> jax.Array:
    """A vector (k,) with zeros where the subspace holds its coordinates."""
    if subspace.operator != _HELD_IN_PART:
        return x
    return _concatenate(subspace.layout, None, _moved_split(subspace.layout, subspace.arrays, x))


def rows_without_held(subspace: Subspace, rows: Rows) -> Rows:
    """The same of gradients in parts, one of each tuned leaf."""
    if subspace.operator != _HELD_IN_PART:
        return rows
    return [_row_without_held(m, x) for m, x in zip(subspace.arrays, rows, strict=True)]


def _row_without_held(moved, part):
    if isinstance(part, Outer):
        return Outer(*(jnp.where(m, x, 0) for m, x in zip(moved, part, strict=True)))
    return jax.vmap(lambda x: _where_moved(moved, x.reshape(_shape_of(moved, x))).ravel())(part)


def _shape_of(moved, x):
    return (len(moved.left), len(moved.right)) if isinstance(moved, Outer) else x.shape


def full(params: Params, *, where: str | None = None) -> Subspace:
    """All coordinates of the tuned leaves: P is the identity, or a selection of leaves by path.

    >>> params = {"encoder": jnp.ones((2, 3)), "head": jnp.zeros(3)}
    >>> full(params).dim, full(params, where="head").dim
    (9, 3)
    """
    return whole_of(layout_of(params, where), "full" if where is None else f"leaves matching {where!r}")


def whole_of(layout: Layout, name: str = "full") -> Subspace:
    """All coordinates of a layout's tuned leaves."""
    return Subspace(dim=layout.num_params, layout=layout, operator=_WHOLE, orthonormal=True, name=name, arrays=None)


# --- dense bases, one (k, *shape) array per tuned leaf ---


def _combine(layout, basis, w):
    return [jnp.tensordot(w, b, axes=1, precision=_HIGHEST) for b in basis]


def _inner(layout, basis, leaves):
    return sum(
        jnp.tensordot(b.reshape(len(b), -1), x.ravel(), axes=1, precision=_HIGHEST)
        for b, x in zip(basis, leaves, strict=True)
    )


def _dense(layout: Layout, basis: list[jax.Array], *, orthonormal: bool, name: str) -> Subspace:
    return Subspace(
        dim=len(basis[0]),
        layout=layout,
        operator=_Operator(_combine, _inner),
        orthonormal=orthonormal,
        name=name,
        arrays=basis,
    )


def _rows_to_basis(layout: Layout, rows: jax.Array) -> list[jax.Array]:
    return jax.vmap(lambda row: _split(layout, None, row))(rows)


def orthonormal(key: jax.Array, params: Params, dim: int, *, where: str | None = None) -> Subspace:
    """A uniformly random k-dimensional subspace with an orthonormal basis (QR of a Gaussian matrix)."""
    layout = layout_of(params, where)
    _check_dim(layout, dim)
    columns, _ = jnp.linalg.qr(jax.random.normal(key, (layout.num_params, dim), layout.dtype))
    return _dense(layout, _rows_to_basis(layout, columns.T), orthonormal=True, name="orthonormal")


def span(params: Params, directions: Params, *, where: str | None = None, orthonormal: bool = False) -> Subspace:
    """The span of given directions.

    Args:
      params: the pretrained parameters.
      directions: pytree like `params` with a leading axis k: the columns of P.
      where: regular expression of the leaves to tune.
      orthonormal: the caller's word that P^T P = I; otherwise `gram` computes it.
    """
    layout = layout_of(params, where)
    leaves = [jnp.asarray(x, layout.dtype) for x, t in zip(jax.tree.leaves(directions), layout.tuned, strict=True) if t]
    for x, shape in zip(leaves, layout.tuned_shapes, strict=True):
        if x.shape[1:] != shape or len(x) != len(leaves[0]):
            raise ValueError(f"Expected directions of shape ({len(leaves[0])}, *{shape}), found {x.shape}.")
    _check_dim(layout, len(leaves[0]))
    return _dense(layout, leaves, orthonormal=orthonormal, name="span")


# --- random projections, made again from their keys at each call: see `sketching` ---


@functools.cache
def _key_operator(kind: str, dim: int) -> _Operator:
    """One operator for each kind and dimension, so that equal constructions compile once."""
    lift, project = getattr(sketching, f"{kind}_lift"), getattr(sketching, f"{kind}_project")
    gram = getattr(sketching, f"{kind}_gram", None)
    project_rows = getattr(sketching, f"{kind}_project_rows", None)
    return _Operator(
        lift=lambda layout, key, w: lift(layout.tuned_shapes, key, w),
        project=lambda layout, key, leaves: project(layout.tuned_shapes, key, dim, leaves),
        gram=gram and (lambda layout, key: gram(layout.tuned_shapes, key, dim, layout.dtype)),
        project_rows=project_rows and (lambda layout, key, rows: project_rows(layout.tuned_shapes, key, dim, rows)),
    )


def _regenerated(kind: str, layout: Layout, key: jax.Array, dim: int, *, orthonormal: bool) -> Subspace:
    operator = _key_operator(kind, dim)
    return Subspace(dim=dim, layout=layout, operator=operator, orthonormal=orthonormal, name=kind, arrays=key)


def count_sketch(key: jax.Array, params: Params, dim: int, *, where: str | None = None) -> Subspace:
    """A count-sketch with exactly orthonormal columns, in O(d) time and with nothing of size d stored."""
    return count_sketch_of(key, layout_of(params, where), dim)


def count_sketch_of(key: jax.Array, layout: Layout, dim: int) -> Subspace:
    """`count_sketch` of a layout's tuned leaves."""
    _check_dim(layout, dim)
    return _regenerated("count_sketch", layout, key, dim, orthonormal=True)


_STORED_BYTES = 2**30


def gaussian(
    key: jax.Array, params: Params, dim: int, *, where: str | None = None, stored: bool | None = None
) -> Subspace:
    """Random Gaussian directions with E[P^T P] = I: entries N(0, 1/d).

    Args:
      key: public randomness.
      params: the pretrained parameters.
      dim: k.
      where: regular expression of the leaves to tune.
      stored: keep the (k, d) numbers, or make them again from the key in blocks at each use; by default they are kept
        up to a gibibyte. Both are the same subspace.
    """
    layout = layout_of(params, where)
    _check_dim(layout, dim)
    if stored is None:
        stored = dim * layout.num_params * layout.dtype.itemsize <= _STORED_BYTES
    if stored:
        columns = sketching.gaussian_columns(layout.tuned_shapes, key, dim, layout.dtype)
        return _dense(layout, columns, orthonormal=False, name="gaussian")
    return _regenerated("gaussian", layout, key, dim, orthonormal=False)


# --- directions inside another subspace ---


def _composed_lift(layout, arrays, w):
    outer, basis = arrays
    return outer.operator.lift(layout, outer.arrays, jnp.matmul(basis, w, precision=_HIGHEST))


def _composed_project(layout, arrays, leaves):
    outer, basis = arrays
    return jnp.matmul(basis.T, outer.operator.project(layout, outer.arrays, leaves), precision=_HIGHEST)


def compose(outer: Subspace, basis: jax.Array, *, orthonormal: bool = False, name: str | None = None) -> Subspace:
    """The subspace P_outer B for B (k_outer, k).

    Args:
      outer: any subspace.
      basis: (k_outer, k) columns inside it.
      orthonormal: the caller's word that B^T B = I (and hence P^T P = I where the outer one is orthonormal).
      name: of your own, in place of "directions in ..."; see `certified_name`.
    """
    if basis.ndim != 2 or basis.shape[0] != outer.dim or not 1 <= basis.shape[1] <= outer.dim:
        raise ValueError(f"Expected a basis of shape ({outer.dim}, k) with k <= {outer.dim}, found {basis.shape=}.")
    return Subspace(
        dim=basis.shape[1],
        layout=outer.layout,
        operator=_Operator(_composed_lift, _composed_project),
        orthonormal=orthonormal and outer.orthonormal,
        name=name or f"directions in {outer.name}",
        arrays=(outer, jnp.asarray(basis, outer.layout.dtype)),
    )


def certified_name(subspace: Subspace) -> str:
    """What a subspace is in the words of this room, whatever its name says: a certificate knows no others.

    >>> params = {"w": jnp.ones(3)}
    >>> certified_name(compose(full(params), jnp.eye(3)[:, :2], name="provably private"))
    'directions in full'
    """
    name = subspace.name
    if subspace.operator.lift is not _composed_lift:
        return name if re.fullmatch(BASE_NAME, name) else "given operator"
    outer, _ = subspace.arrays
    within = certified_name(outer)
    if subspace.dim == outer.dim:  # other columns of the same space
        return within
    return f"{TOP if name.startswith(TOP) else DIRECTIONS}{within}"


_ORTHONORMALISED_UP_TO = 2048


def orthonormalise(subspace: Subspace) -> Subspace:
    """The same span with orthonormal columns, P L^{-T} for P^T P = L L^T; runs on the host.

    Raises:
      ValueError: if the columns are linearly dependent, or too many for a dense factorisation.
    """
    if subspace.orthonormal:
        return subspace
    if subspace.dim > _ORTHONORMALISED_UP_TO:
        raise ValueError(f"Expected orthonormal columns where k > {_ORTHONORMALISED_UP_TO}, found k = {subspace.dim}.")
    matrix = np.asarray(_gram(subspace), np.float64)
    try:
        basis = np.linalg.inv(np.linalg.cholesky(matrix)).T
    except np.linalg.LinAlgError:
        raise ValueError(
            f"Expected linearly independent directions, found a singular P^T P, {matrix.shape=}."
        ) from None
    spanned = compose(subspace, jnp.asarray(basis, subspace.layout.dtype), name=subspace.name)
    return dataclasses.replace(spanned, orthonormal=True)


_gram = jax.jit(gram)
