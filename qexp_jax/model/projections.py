"""Subspaces spanned by given or random directions: stored as they are, or made again from a key at each use."""

import jax
import jax.numpy as jnp

from qexp_jax.data.records import Params
from qexp_jax.model import gaussian_sketch, operators
from qexp_jax.model.layout import Layout, layout_of
from qexp_jax.model.operators import Subspace

_STORED_BYTES = 2**30  # beyond, Gaussian directions are made again from their key at each use


# --- stored bases, one (k, *shape) array per tuned leaf ---


def is_stored(subspace: Subspace) -> bool:
    """Whether P lies in memory, as an array of k rows for each tuned leaf."""
    return subspace.operator == operators.DENSE


def _dense(layout: Layout, basis: list[jax.Array], *, orthonormal: bool, name: str) -> Subspace:
    """Of a basis in memory, a (k, *shape) array for each tuned leaf."""
    return Subspace(
        dim=len(basis[0]),
        layout=layout,
        operator=operators.DENSE,
        orthonormal=orthonormal,
        name=name,
        arrays=basis,
    )


def orthonormal(key: jax.Array, params: Params, dim: int, *, where: str | None = None) -> Subspace:
    """A uniformly random k-dimensional subspace with an orthonormal basis (QR of a Gaussian matrix).

    Args:
      key: public randomness.
      params: the pretrained parameters.
      dim: k.
      where: regular expression of the leaves to tune.
    """
    layout = layout_of(params, where)
    _check_dim(layout, dim)
    # Q of a Gaussian matrix spans a uniformly random subspace, whatever signs the factorisation gives its columns.
    columns, _ = jnp.linalg.qr(jax.random.normal(key, (layout.num_params, dim), layout.dtype))
    basis = jax.vmap(lambda column: operators.split(layout, None, column))(columns.T)
    return _dense(layout, basis, orthonormal=True, name="orthonormal")


def span(params: Params, directions: Params, *, where: str | None = None, orthonormal: bool = False) -> Subspace:
    """The span of given directions.

    Args:
      params: the pretrained parameters.
      directions: pytree like `params` with a leading axis k: the columns of P.
      where: regular expression of the leaves to tune.
      orthonormal: the caller's word that P^T P = I; otherwise `gram` computes it.
    """
    layout = layout_of(params, where)
    pairs = zip(jax.tree.leaves(directions), layout.tuned, strict=True)
    leaves = [jnp.asarray(x, layout.dtype) for x, is_tuned in pairs if is_tuned]
    dim = len(leaves[0])
    for x, shape in zip(leaves, layout.tuned_shapes, strict=True):
        if x.shape[1:] != shape or len(x) != dim:
            raise ValueError(f"Expected directions of shape ({dim}, *{shape}), found {x.shape}.")
    _check_dim(layout, dim)
    return _dense(layout, leaves, orthonormal=orthonormal, name="span")


# --- random projections, made again from their keys at each call: see `panels` ---


def _regenerated(kind: str, layout: Layout, key: jax.Array, dim: int, *, orthonormal: bool) -> Subspace:
    """Of a key alone: its numbers are made again at each use, by the module of that kind."""
    return Subspace(
        dim=dim,
        layout=layout,
        operator=operators.from_key(kind, dim),
        orthonormal=orthonormal,
        name=kind,
        arrays=key,
    )


def count_sketch(key: jax.Array, params: Params, dim: int, *, where: str | None = None) -> Subspace:
    """A count-sketch with exactly orthonormal columns, in O(d) time and with nothing of size d stored.

    Args:
      key: public randomness.
      params: the pretrained parameters.
      dim: k.
      where: regular expression of the leaves to tune.
    """
    return count_sketch_of(key, layout_of(params, where), dim)


def count_sketch_of(key: jax.Array, layout: Layout, dim: int) -> Subspace:
    """`count_sketch` of a layout's tuned leaves."""
    _check_dim(layout, dim)
    return _regenerated("count_sketch", layout, key, dim, orthonormal=True)


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
        columns = gaussian_sketch.columns(layout.tuned_shapes, key, dim, layout.dtype)
        return _dense(layout, columns, orthonormal=False, name="gaussian")
    return _regenerated("gaussian", layout, key, dim, orthonormal=False)


def _check_dim(layout: Layout, dim: int) -> None:
    if not 1 <= dim <= layout.num_params:
        raise ValueError(f"Expected a subspace dimension in [1, {layout.num_params}], found {dim=}.")
