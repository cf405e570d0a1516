"""Release keys: drawn from the operating system's entropy, secret, one a release; all noise is threefry's."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.numerics.compilation import FEW, compiled

THREEFRY = "threefry2x32"


def fresh_key() -> jax.Array:
    """A typed key with as many random bits as the default PRNG takes (threefry: 64).

    `jax.random.key(seed)` of a small seed is for demonstrations: whoever tries all seeds knows the noise. The key is as
    secret as the private records, from the draw on for as long as the release is out: its repr shows its bits, so never
    print or log it. In several processes, one draws it and broadcasts it.

    A release that is to go on from a checkpoint in another process needs the same key: keep `jax.random.key_data(key)`
    where the private records are, as unreadable to others as they are, and delete it once the release is done.

    >>> key = fresh_key()
    >>> key.shape, key.dtype == jax.random.key(0).dtype, bool(key == fresh_key())
    ((), True, False)
    """
    # How many words a key has depends on the default generator, which is a setting of JAX.
    shape = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    words = np.frombuffer(os.urandom(4 * int(np.prod(shape))), np.uint32).reshape(shape)
    return jax.random.wrap_key_data(jnp.asarray(words))


def generator(key: jax.Array) -> np.random.Generator:
    """NumPy's generator of a **public** key, for choices of records: on the host they take a fiftieth of the time."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


@functools.partial(compiled, static_argnums=1, few=FEW)
def split(key: jax.Array, number: int) -> tuple[jax.Array, ...]:
    """Independent keys, as of `jax.random.split`; one small program."""
    return tuple(jax.random.split(key, number))


@functools.partial(compiled, static_argnums=1, few=FEW)
def one_of(key: jax.Array, number: int, index: jax.Array | int) -> jax.Array:
    """The one at `index`, as of `jax.random.split`; of many, none is taken apart but this."""
    return jax.random.split(key, number)[index]


def as_threefry(key: jax.Array) -> jax.Array:
    """The threefry key of a typed key of any generator, all of whose words it depends on; a threefry key as it is.

    Other generators do not map over keys one by one: under `jax.vmap`, `rbg` and `unsafe_rbg` draw with the first key
    alone.
    """
    if str(jax.random.key_impl(key)) == THREEFRY:
        return key
    words = jax.random.key_data(key).ravel()
    found = jax.random.wrap_key_data(words[:2], impl=THREEFRY)
    # A generator of longer keys: to drop words would make equal noise of different keys.
    for word in words[2:]:
        found = jax.random.fold_in(found, word)
    return found
