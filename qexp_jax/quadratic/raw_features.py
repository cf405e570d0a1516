"""Raw features: a function `(arrays, params, record) -> (q,)`, of the caller's own, or applied to many records.

What is public and static about it is the function, what is public and numeric its `arrays`; so equal rules compile
once.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qexp_jax.data.records import Params, Record, num_records
from qexp_jax.numerics.compilation import compiled

Raw = Callable[[Any, Params, Record], jax.Array]


@functools.partial(compiled, static_argnums=0)
def raw_each(raw: Raw, arrays: Any, params: Params, records: Record) -> jax.Array:
    """Those of n records, (n, q).

    Args:
      raw: the function; it is static, so that a new one compiles anew.
      arrays: its numbers.
      params: where activations are taken; none where it is of the record alone.
      records: pytree with a leading axis.
    """
    return jax.lax.map(lambda record: raw(arrays, params, record), records, batch_size=at_a_time(records))


def at_a_time(records: Record) -> int:
    """Records whose features are held together."""
    return min(256, num_records(records))


def takes_params(features: Callable[..., Any]) -> bool:
    """Whether a function of the caller's own is of `(params, record)`, not of a record alone."""
    arguments = inspect.signature(features).parameters.values()
    # A second one with a default is a setting of the features, not the parameters.
    needed = [x for x in arguments if x.default is x.empty]
    positional = [x for x in needed if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1


@functools.lru_cache(maxsize=64)
def of_function(features: Callable[..., Any]) -> Raw:
    """All numbers that a function of the caller's own returns, in one row; it has no `arrays`."""
    is_of_params = takes_params(features)

    def raw(arrays, params, record):
        found = features(params, record) if is_of_params else features(record)
        parts = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(found)]
        # Zeros first, so that a function that returns nothing has a row too.
        return jnp.concatenate([jnp.zeros(0), *parts])

    return raw
