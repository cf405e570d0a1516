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
import re

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import Params
from qexp_jax.model import operators
from qexp_jax.model.holding import HELD_IN_PART, holding, num_moved, rows_without_held, without_held
from qexp_jax.model.layout import (
    Layout,
    layout_of,
    leaf_names,
    tuned_leaves,
    with_tuned_leaves,
    without_still_leaves,
    working,
)
from qexp_jax.model.operators import Subspace
from qexp_jax.model.projections import count_sketch, count_sketch_of, gaussian, is_stored, orthonormal, span
from qexp_jax.privacy.subspace_names import BASE_NAME, DIRECTIONS, TOP

_ORTHONORMALISED_UP_TO = 2048  # directions, for a dense factorisation on the host

__all__ = [
    "Layout",
    "Subspace",
    "certified_name",
    "compose",
    "count_sketch",
    "count_sketch_of",
    "displace",
    "full",
    "gaussian",
    "gram",
    "holding",
    "is_stored",
    "is_whole",
    "layout_of",
    "leaf_names",
    "lift",
    "num_moved",
    "orthonormal",
    "orthonormalise",
    "project",
    "rows_without_held",
    "span",
    "tuned_leaves",
    "whole_of",
    "with_tuned_leaves",
    "without_held",
    "without_still_leaves",
    "working",
]


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


def displace(subspace: Subspace, params: Params, w: jax.Array) -> Params:
    """theta + P w in the working precision; leaves that are not tuned stay as they are."""
    layout = subspace.layout
    steps = subspace.operator.lift(layout, subspace.arrays, w)
    moved = [x + step for x, step in zip(tuned_leaves(layout, params), steps, strict=True)]
    return with_tuned_leaves(layout, params, moved)


def gram(subspace: Subspace) -> jax.Array:
    """P^T P (k, k): the identity where the columns are orthonormal, else by default k lifts and projections."""
    eye = jnp.eye(subspace.dim, dtype=subspace.layout.dtype)
    if subspace.orthonormal:
        return eye
    if subspace.operator.gram is not None:
        return subspace.operator.gram(subspace.layout, subspace.arrays)
    columns = jax.lax.map(lambda e: project(subspace, lift(subspace, e)), eye)
    return (columns + columns.T) / 2  # rounding leaves it not quite symmetric


def is_whole(subspace: Subspace) -> bool:
    """Whether its coordinates are those of the tuned leaves, one after the other."""
    return subspace.operator in (operators.WHOLE, HELD_IN_PART)


def full(params: Params, *, where: str | None = None) -> Subspace:
    """All coordinates of the tuned leaves: P is the identity, or a selection of leaves by path.

    >>> params = {"encoder": jnp.ones((2, 3)), "head": jnp.zeros(3)}
    >>> full(params).dim, full(params, where="head").dim
    (9, 3)
    """
    name = "full" if where is None else f"leaves matching {where!r}"
    return whole_of(layout_of(params, where), name)


def whole_of(layout: Layout, name: str = "full") -> Subspace:
    """All coordinates of a layout's tuned leaves."""
    return Subspace(
        dim=layout.num_params,
        layout=layout,
        operator=operators.WHOLE,
        orthonormal=True,
        name=name,
        arrays=None,
    )


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
        operator=operators.COMPOSED,
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
    # Who makes an operator may call it anything: only the words of `subspace_names` go into a certificate.
    if subspace.operator.lift is not operators.COMPOSED.lift:
        return name if re.fullmatch(BASE_NAME, name) else "given operator"
    outer, _ = subspace.arrays
    within = certified_name(outer)
    if subspace.dim == outer.dim:  # other columns of the same space
        return within
    return f"{TOP if name.startswith(TOP) else DIRECTIONS}{within}"


def orthonormalise(subspace: Subspace) -> Subspace:
    """The same span with orthonormal columns, P L^{-T} for P^T P = L L^T; runs on the host.

    Raises:
      ValueError: if the columns are linearly dependent, or too many for a dense factorisation.
    """
    if subspace.orthonormal:
        return subspace
    if subspace.dim > _ORTHONORMALISED_UP_TO:
        raise ValueError(f"Expected orthonormal columns where k > {_ORTHONORMALISED_UP_TO}, found k = {subspace.dim}.")
    # In float64, as the condition number of P^T P is the square of that of P.
    matrix = np.asarray(_gram(subspace), np.float64)
    try:
        basis = np.linalg.inv(np.linalg.cholesky(matrix)).T
    except np.linalg.LinAlgError:
        raise ValueError(
            f"Expected linearly independent directions, found a singular P^T P, {matrix.shape=}."
        ) from None
    spanned = compose(subspace, jnp.asarray(basis, subspace.layout.dtype), name=subspace.name)
    # `compose` would want an orthonormal basis within an orthonormal subspace; here they make up for each other.
    return dataclasses.replace(spanned, orthonormal=True)


_gram = jax.jit(gram)
