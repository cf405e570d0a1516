"""Pure functions give the same under jit, without it, and on several devices; and are traced once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from problems import spd

from qexp_jax import mechanism, precision

KEY = jax.random.key(0)
K = 5
QUADRATIC = mechanism.Quadratic(precision.dense(spd(KEY, K)), jnp.linspace(-1.0, 2.0, K), 10)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_draws_are_the_same(self):
        """One key, one draw, however it is compiled."""
        draw = self.variant(lambda words: mechanism.draw(jax.random.wrap_key_data(words), QUADRATIC, 0.3))
        found = draw(jax.random.key_data(KEY))
        chex.assert_shape(found, (K,))
        chex.assert_tree_all_finite(found)
        chex.assert_trees_all_close(found, mechanism.draw(KEY, QUADRATIC, 0.3), rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_no_noise_is_the_minimiser(self):
        """In the limit a draw is -A^{-1} g."""
        draw = self.variant(lambda words: mechanism.draw(jax.random.wrap_key_data(words), QUADRATIC, 1e-9))
        gradient = precision.color(QUADRATIC.precision, QUADRATIC.whitened_sum)
        chex.assert_trees_all_close(draw(jax.random.key_data(KEY)), -gradient / QUADRATIC.num_units, rtol=1e-4)


def test_draws_are_traced_once():
    """For equal shapes, whatever key, sum and noise."""
    draw = jax.jit(chex.assert_max_traces(mechanism.draw, n=1))
    for seed in range(3):
        quadratic = QUADRATIC._replace(whitened_sum=jnp.full(K, float(seed)))
        found = draw(jax.random.key(seed), quadratic, 0.1 * (seed + 1))
        assert np.all(np.isfinite(found))
