import os

import jax
import numpy as np
import pytest

from qexp_jax import keys
from qexp_jax.data import validation


def test_a_key_carries_the_systems_entropy_in_full(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "urandom", lambda n: asked.append(n) or bytes(range(1, n + 1)))
    key = keys.fresh_key()
    validation.check_key(key)
    assert asked == [8]
    assert np.asarray(jax.random.key_data(key)).tobytes() == bytes(range(1, 9))


def test_keys_of_the_configured_prng_are_drawn():
    with jax.default_prng_impl("rbg"):
        key = keys.fresh_key()
    assert jax.random.key_impl(key) == "rbg" and jax.random.key_data(key).shape == (4,)


def test_keys_differ_in_every_bit_position():
    words = np.stack([jax.random.key_data(keys.fresh_key()) for _ in range(64)])
    assert len(np.unique(words, axis=0)) == 64
    assert np.all(np.bitwise_or.reduce(words) == 2**32 - 1)  # a bit that is never set: probability 64 * 2^-64
    assert np.all(np.bitwise_and.reduce(words) == 0)


@pytest.mark.parametrize("key", [0, jax.random.PRNGKey(7), np.uint32([1, 2])])
def test_a_refused_key_is_not_printed(key):
    with pytest.raises(ValueError, match="typed key") as error:
        validation.check_key(key)
    assert "7" not in str(error.value) and "[" not in str(error.value)
