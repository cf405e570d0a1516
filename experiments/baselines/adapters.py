"""Which parameters a baseline trains: all, the last layer, the biases (BiTFiT), or low-rank factors (LoRA).

An adapter is a pair of pure functions: `split(key, params) -> (trainable, frozen)` and `merge(trainable, frozen) ->
params`, where merging what was just split gives the parameters back. Biases: Ben Zaken et al., arXiv:2106.10199, under
DP Bu et al., arXiv:2210.00036; LoRA: Hu et al., arXiv:2106.09685, under DP Yu et al., arXiv:2110.06500.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

LORA_RANK = 4


class Adapter(NamedTuple):
    """`split(key, params) -> (trainable, frozen)` and `merge(trainable, frozen) -> params`."""

    split: Callable[[jax.Array, Any], tuple[Any, Any]]
    merge: Callable[[Any, Any], Any]


def _subset(keep: Callable[[tuple[str, ...]], bool]) -> Adapter:
    """Trains the leaves whose path satisfies `keep`."""

    def split(key, params):
        flat = flatten_dict(params)
        return {path: leaf for path, leaf in flat.items() if keep(path)}, params

    def merge(trainable, frozen):
        return unflatten_dict(flatten_dict(frozen) | trainable)

    return Adapter(split, merge)


def _lora_split(key, params):
    flat = flatten_dict(params)
    kernels = sorted(path for path, leaf in flat.items() if leaf.ndim >= 2)
    factors = {}
    for path, subkey in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
        fan_in, fan_out = flat[path].size // flat[path].shape[-1], flat[path].shape[-1]
        factors[path] = (
            jax.random.normal(subkey, (fan_in, LORA_RANK)) / LORA_RANK**0.5,
            jnp.zeros((LORA_RANK, fan_out)),
        )
    return factors, params


def _lora_merge(trainable, frozen):
    flat = flatten_dict(frozen)
    updated = {path: flat[path] + (a @ b).reshape(flat[path].shape) for path, (a, b) in trainable.items()}
    return unflatten_dict(flat | updated)


ADAPTERS = {
    "all": _subset(lambda path: True),
    "last": _subset(lambda path: "head" in path),
    "bias": _subset(lambda path: path[-1] == "bias"),
    "lora": Adapter(_lora_split, _lora_merge),
}
