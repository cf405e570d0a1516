"""Draws of N(0, H^{-1}) from a precision H that is factored once, against other libraries.

A baseline is timed as it is called, from H (numpyro) or from the covariance (the others), which factors again at each
call, and, where its object can keep the factor, with the factor kept. JAX's products on an accelerator have ten bits of
mantissa unless told otherwise, ours 24: baselines that keep the factor are timed with both.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.libraries import find
from experiments.benchmarks.timing import Calls, Row, race, rows_against
from qexp_jax import precision

PATH = "draws"
OWN_PARTS = "triangular solve + random numbers"


def rows(dim: int, num_draws: int, *, seconds: float) -> Iterator[Row]:
    """One dimension and number of draws."""
    key = jax.random.key(6)
    basis = jax.random.normal(key, (dim, dim)) / np.sqrt(dim)
    matrix = jnp.matmul(basis, basis.T, precision=jax.lax.Precision.HIGHEST) + jnp.eye(dim)
    upper = jnp.linalg.cholesky(matrix).T
    kept = jax.jit(functools.partial(precision.draws, num_draws=num_draws))
    alone = jax.jit(functools.partial(_solve, num_draws=num_draws))
    factored = precision.dense(matrix)
    ours = {"ours": lambda: kept(key, factored), OWN_PARTS: lambda: alone(key, upper)}
    times = race(ours | factor_kept(key, matrix, num_draws), seconds=seconds)
    # Apart, since a factorisation takes seconds where a draw takes milliseconds.
    again = race(factored_again(key, matrix, num_draws), seconds=seconds, least=1)
    peers = {name: seconds for name, seconds in (times | again).items() if name not in ours}
    # Nobody draws in less than the floor takes.
    goals = {OWN_PARTS: 1 / 1.5} | {name: min(1.0, seconds / times[OWN_PARTS]) for name, seconds in peers.items()}
    yield from rows_against(PATH, f"k={dim}, draws={num_draws}", again | times, goals)


def _solve(key: jax.Array, upper: jax.Array, num_draws: int) -> jax.Array:
    """What a draw needs at least: normal numbers and one triangular solve."""
    noise = jax.random.normal(key, (num_draws, len(upper)))
    return jax.lax.linalg.triangular_solve(upper.T, noise.T, left_side=True, lower=True, transpose_a=True).T


def factor_kept(key: jax.Array, matrix: jax.Array, num_draws: int) -> Calls:
    """Distributions built once."""
    found = _factor_kept(key, matrix, num_draws, jax.jit)
    if jax.default_backend() == "cpu":
        return found
    exact = _factor_kept(key, matrix, num_draws, lambda run: jax.jit(_in_float32(run)))
    return found | {f"{name}, float32 products": run for name, run in exact.items()}


def _in_float32(run: Callable[..., Any]) -> Callable[..., Any]:
    def exact(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return run(*args)

    return exact


def _factor_kept(
    key: jax.Array, matrix: jax.Array, num_draws: int, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Calls:
    """`compiled` is `jax.jit`, or that with products in float32."""
    found = {}
    numpyro = find("numpyro")
    distrax = find("distrax")
    if numpyro is not None:
        import numpyro.distributions as dist

        built = jax.jit(lambda h: dist.MultivariateNormal(precision_matrix=h))(matrix)
        sample = compiled(lambda key, d: d.sample(key, (num_draws,)))
        found["numpyro, factor kept"] = lambda: sample(key, built)
    if distrax is not None:
        scale = jnp.linalg.cholesky(jnp.linalg.inv(matrix))
        normal = distrax.MultivariateNormalTri
        draw = compiled(lambda key, s: normal(scale_tri=s).sample(seed=key, sample_shape=num_draws))
        found["distrax, factor kept"] = lambda: draw(key, scale)
    return found


def factored_again(key: jax.Array, matrix: jax.Array, num_draws: int) -> Calls:
    """One call from the matrix to the draws."""
    covariance = jnp.linalg.inv(matrix)
    zeros = jnp.zeros(len(matrix))
    builtin = jax.jit(lambda key, c: jax.random.multivariate_normal(key, zeros, c, (num_draws,), method="cholesky"))
    found = {"jax.random.multivariate_normal": lambda: builtin(key, covariance)}
    numpyro = find("numpyro")
    distrax = find("distrax")
    if numpyro is not None:
        import numpyro.distributions as dist

        sample = jax.jit(lambda key, h: dist.MultivariateNormal(precision_matrix=h).sample(key, (num_draws,)))
        found["numpyro"] = lambda: sample(key, matrix)
    if distrax is not None:
        full = distrax.MultivariateNormalFullCovariance
        draw = jax.jit(lambda key, c: full(covariance_matrix=c).sample(seed=key, sample_shape=num_draws))
        found["distrax"] = lambda: draw(key, covariance)
    return found
