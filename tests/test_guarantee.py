"""The exact privacy curve for adversarial neighbours: never above the claim, touching it, and rejecting twins.

The output law of the mechanism on each neighbour is N(mean, covariance); its exact delta(epsilon) is found from the two
laws alone (in closed form where the covariances agree, by integration over draws else), not from the library's bound.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, spd
from scipy import stats

from qexp_jax import NeighboringRelation, clipping, precision, privacy, subspace

KEY = jax.random.key(9)
K, CLIP, MU = 4, 1.5, 0.8
MATRIX = np.asarray(spd(KEY, K, condition=50.0) / 10, float)
PARAMS = {"w": jnp.zeros(K)}
EPSILONS = [0.0, 0.3, 1.0, 2.0]
SOFT = np.linalg.eigh(MATRIX)[1][:, 0]  # the direction that whitening stretches most


def library_sum(gradients):
    total, _ = clipping.clipped_sum(
        linear_loss,
        PARAMS,
        subspace.full(PARAMS),
        precision.dense(jnp.asarray(MATRIX, jnp.float32)),
        {"g": jnp.asarray(gradients, jnp.float32).reshape(-1, K)},
        l2_clip_norm=CLIP,
    )
    return np.asarray(total, float)


def output_law(total, count, relation, noise_scale=1.0):
    """Mean and covariance of the release for a whitened sum."""
    noise_std = noise_scale * CLIP * privacy.noise_multiplier(MU, relation)
    inverse_root = np.linalg.inv(np.linalg.cholesky(MATRIX)).T  # R^{-T}
    return -inverse_root @ total / count, (noise_std / count) ** 2 * inverse_root @ inverse_root.T


def exact_delta(law_a, law_b, epsilon):
    """delta(epsilon) of one Gaussian against another."""
    (mean_a, cov_a), (mean_b, cov_b) = law_a, law_b
    if not (np.all(np.isfinite(mean_a)) and np.all(np.isfinite(mean_b))):
        return 1.0  # a NaN is seen by everyone
    if np.allclose(cov_a, cov_b, rtol=1e-12):
        gap = mean_a - mean_b
        distance = np.sqrt(gap @ np.linalg.solve(cov_a, gap))
        return privacy.delta_from_mu(max(distance, 1e-9), epsilon)
    a, b = stats.multivariate_normal(mean_a, cov_a), stats.multivariate_normal(mean_b, cov_b)
    draws = a.rvs(400_000, random_state=0)
    return float(np.mean(np.maximum(0, 1 - np.exp(epsilon + b.logpdf(draws) - a.logpdf(draws)))))


def worst_excess(pairs, relation, law=output_law, sum_fn=library_sum):
    """Largest attained minus claimed delta over neighbours, both orders and epsilons; positive is a violation."""
    worst = -np.inf
    for (data_a, count_a), (data_b, count_b) in pairs:
        laws = law(sum_fn(data_a), count_a, relation), law(sum_fn(data_b), count_b, relation)
        for one, other in (laws, laws[::-1]):
            for epsilon in EPSILONS:
                worst = max(worst, exact_delta(one, other, epsilon) - privacy.delta_from_mu(MU, epsilon))
    return worst


BASE = np.asarray(jax.random.normal(KEY, (6, K)), float)
EXTREME = 1e3 * SOFT
ZEROED = np.vstack([BASE, np.zeros(K)])  # an emptied slot contributes nothing
NEIGHBOURS = {
    NeighboringRelation.REPLACE_SPECIAL: [
        ((np.vstack([BASE, record]), 7), (ZEROED, 7)) for record in (EXTREME, -EXTREME, 0.1 * SOFT, BASE[0])
    ],
    NeighboringRelation.ADD_OR_REMOVE_ONE: [
        # N is the public count 7, whatever the true number is
        ((np.vstack([BASE, record]), 7), (BASE, 7))
        for record in (EXTREME, -EXTREME, np.full(K, np.nan))
    ],
    NeighboringRelation.REPLACE_ONE: [((np.vstack([BASE, EXTREME]), 7), (np.vstack([BASE, -EXTREME]), 7))],
}


@pytest.mark.parametrize("relation", NEIGHBOURS)
def test_attained_delta_never_exceeds_the_claim_and_touches_it_at_the_clip_boundary(relation):
    worst = worst_excess(NEIGHBOURS[relation], relation)
    assert -1e-5 < worst < 1e-5


def test_half_the_noise_is_rejected():
    pairs = NEIGHBOURS[NeighboringRelation.REPLACE_SPECIAL]
    halved = lambda *args: output_law(*args, noise_scale=0.5)
    assert worst_excess(pairs, NeighboringRelation.REPLACE_SPECIAL, law=halved) > 0.1


def test_replace_one_accounted_as_zero_out_is_rejected():
    pairs = NEIGHBOURS[NeighboringRelation.REPLACE_ONE]
    assert worst_excess(pairs, NeighboringRelation.REPLACE_SPECIAL) > 0.1


def test_l2_clipping_accounted_as_whitened_is_rejected():
    inverse_root = np.linalg.inv(np.linalg.cholesky(MATRIX))

    def l2_clipped(gradients):
        factors = np.minimum(1, CLIP / np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-300))
        return inverse_root @ (gradients * factors).sum(axis=0)

    pairs = NEIGHBOURS[NeighboringRelation.REPLACE_SPECIAL]
    assert worst_excess(pairs, NeighboringRelation.REPLACE_SPECIAL, sum_fn=l2_clipped) > 0.1


def test_a_private_number_of_units_is_rejected():
    pairs = [((BASE[:3], 3), (BASE[:2], 2))]  # the true n in place of a public count
    assert worst_excess(pairs, NeighboringRelation.ADD_OR_REMOVE_ONE) > 0.05


def test_a_nan_record_that_survives_is_rejected():
    root = np.linalg.cholesky(MATRIX)

    def surviving(gradients):
        whitened = np.linalg.solve(root, np.asarray(gradients).T).T
        norms = np.linalg.norm(whitened, axis=1, keepdims=True)
        return np.sum(whitened * np.minimum(1, CLIP / np.maximum(norms, 1e-300)), axis=0)

    pairs = NEIGHBOURS[NeighboringRelation.ADD_OR_REMOVE_ONE]
    assert worst_excess(pairs, NeighboringRelation.ADD_OR_REMOVE_ONE, sum_fn=surviving) > 0.1


def test_clipping_before_projection_is_rejected():
    """Clip the d-dimensional gradient in its own whitened norm, then project and whiten again: the bound is lost."""
    columns = np.vstack([np.eye(K), 3 * np.eye(K)])  # P is not orthonormal, d = 8
    root = np.linalg.cholesky(MATRIX)

    def clipped_then_projected(gradients):
        norms = np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-300)
        return np.linalg.solve(root, columns.T @ (gradients * np.minimum(1, CLIP / norms)).sum(axis=0))

    record = 1e3 * columns @ SOFT
    pairs = [((np.vstack([np.ones((2, 2 * K)), record]), 3), (np.vstack([np.ones((2, 2 * K)), 0 * record]), 3))]
    assert worst_excess(pairs, NeighboringRelation.REPLACE_SPECIAL, sum_fn=clipped_then_projected) > 0.1
