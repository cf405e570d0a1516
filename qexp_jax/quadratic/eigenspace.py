"""Where public rows have most energy: leading eigenspaces of second moments, by the cheapest of three ways.

From n rows of length d: eigenvectors of a d x d matrix, of an n x n one (the Gram trick), or of a random sketch of the
rows; static shapes decide (`leading_basis`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, microbatches, num_records
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.gradients import projected_gradients
from qexp_jax.model.subspace import Subspace

_HIGHEST = jax.lax.Precision.HIGHEST
_OVERSAMPLED = 64  # random combinations beyond the dimension


def top_eigenspace(
    loss_fn: LossFn,
    params: Params,
    records: Record,
    dim: int,
    *,
    within: Subspace | None = None,
    microbatch_size: int = 64,
) -> tuple[Subspace, jax.Array]:
    """The leading eigenvectors of the second moment of public gradients.

    Costs one gradient per record, stores (n, d) numbers, plus the (k, d) basis that it returns, and factors one matrix
    of min(n, d) rows. Where min(n, d) is at least 4 (k + 64), the space is one of k directions in which the gradients
    have all but a few ten-thousandths of the energy that they have in the leading k, found by random sketches (Halko,
    Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4 with one power) in half the time.

    Args:
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      records: n public records; with labels drawn from the model the matrix is the Fisher information.
      dim: k <= min(n, d).
      within: the space that is searched; by default all parameters.
      microbatch_size: gradients held at a time.

    Returns:
      The subspace, with orthonormal columns where `within` has them, and its k eigenvalues in descending order.
    """
    within = subspaces.full(params) if within is None else within
    n = num_records(records)
    if not 1 <= dim <= min(n, within.dim):
        raise ValueError(f"Expected 1 <= dim <= min({n} records, {within.dim} dimensions), found {dim=}.")
    batches, _ = microbatches(records, microbatch_size)
    rows = jax.lax.map(lambda batch: projected_gradients(loss_fn, params, within, batch), batches)
    rows = rows.reshape(-1, within.dim)[:n]  # the last microbatch is padded
    basis = leading_basis(rows, dim)
    along = _product(rows, basis / np.sqrt(n))
    values = jnp.sum(along**2, axis=0)
    space = subspaces.compose(within, basis, orthonormal=True, name=f"top eigenspace in {within.name}")
    return space, values


def leading_basis(rows: jax.Array, dim: int) -> jax.Array:
    """Orthonormal columns (d, dim) that span where rows (n, d) have most energy; how, static shapes decide.

    Where min(n, d) is at least 4 (dim + 64), all but a few ten-thousandths of the most, see `top_eigenspace`.
    """
    n, d = rows.shape
    if min(n, d) >= 4 * (dim + _OVERSAMPLED):
        return _leading_sketched(rows, dim)
    return _leading_columns(rows, dim) if n >= d else _leading_rows(rows, dim)


@functools.partial(jax.jit, static_argnums=1)
def principal_axes(rows: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Leading principal axes (d, rank) of centred rows (n, d), and their spreads (rank,)."""
    basis = leading_basis(rows, rank)
    along = jnp.matmul(rows, basis, precision=_HIGHEST)
    spreads = jnp.sqrt(jnp.mean(along**2, axis=0))
    return basis, spreads


def _leading_columns(rows: jax.Array, dim: int) -> jax.Array:
    """Eigenvectors of rows^T rows, itself small."""
    _, vectors = jnp.linalg.eigh(_product(rows.T, rows))
    return vectors[:, : -dim - 1 : -1]


def _leading_rows(rows: jax.Array, dim: int) -> jax.Array:
    """The same from rows rows^T, the Gram trick."""
    _, vectors = jnp.linalg.eigh(_product(rows, rows.T))
    return _orthonormal(_product(rows.T, vectors[:, : -dim - 1 : -1]))


def _leading_sketched(rows: jax.Array, dim: int) -> jax.Array:
    """The same within the span of a few random combinations of rows, to which rows rows^T was applied."""
    # A fixed key: a plan is deterministic given its own, and any random combinations of public rows will do.
    sketch = jax.random.normal(jax.random.key(0), (dim + _OVERSAMPLED, len(rows)), rows.dtype)
    powered = _product(_product(sketch, rows), rows.T)
    span = jnp.linalg.qr(powered.T)[0]
    return _leading_rows(_product(span.T, rows), dim)


def _orthonormal(columns: jax.Array) -> jax.Array:
    """Restores the orthogonality that float32 loses on small eigenvalues.

    By Cholesky, in a quarter of a QR's time, where each unit column has nine tenths of its length outside the span of
    those before it, so that rounding is not amplified; else by QR, which dependent columns need.
    """
    unit = columns / jnp.linalg.norm(columns, axis=0)
    lower = jnp.linalg.cholesky(_product(unit.T, unit))
    inverse = jax.lax.linalg.triangular_solve(lower, jnp.eye(len(lower), dtype=lower.dtype), left_side=True, lower=True)
    independent = jnp.min(jnp.diagonal(lower)) > 0.9  # false where Cholesky failed
    return jax.lax.cond(independent, lambda: _product(unit, inverse.T), lambda: jnp.linalg.qr(columns)[0])


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_HIGHEST)
