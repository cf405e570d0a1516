"""Other libraries' side of the private pass; a library that is not installed is left out with a notice."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.cases import Case
from experiments.benchmarks.libraries import find, torch_device
from experiments.benchmarks.timing import Calls
from qexp_jax.data.records import num_records
from qexp_jax.model.convolutions import as_products
from qexp_jax.model.subspace import Subspace, tuned_leaves, with_tuned_leaves


def l2_clips(case: Case, space: Subspace, clip_norm: float, sizes: tuple[int, ...]) -> Calls:
    """The sum of L2-clipped gradients of the tuned leaves, by all who can.

    Args:
      case: model and records.
      space: says which leaves are tuned.
      clip_norm: in the L2 norm.
      sizes: microbatches to try.
    """
    found = _jax_privacy(case, space, clip_norm, sizes)
    if find("opacus") is not None and torch_device() is not None:
        # Only here, as it imports torch.
        from experiments.benchmarks import torch_models

        found |= torch_models.opacus_clips(case, clip_norm, head_only="selected" in space.name)
    return found


def _jax_privacy(case: Case, space: Subspace, clip_norm: float, sizes: tuple[int, ...]) -> Calls:
    """At once and in microbatches, each also with a mask, with which XLA compiles convolutions to something faster.

    And, where there are convolutions, as the products that ours are.
    """
    library = find("jax_privacy")
    if library is None:
        return {}
    layout = space.layout
    leaves = tuned_leaves(layout, case.params)
    loss = lambda leaves, params, record: case.loss_fn(with_tuned_leaves(layout, params, leaves), record)
    n = num_records(case.records)
    nobody = jnp.zeros(n, bool)

    def call_of(loss: Callable[[Any, Any, Any], jax.Array], size: int | None, **mask: jax.Array) -> Callable[[], Any]:
        clip = jax.jit(
            library.clipped_grad(
                loss, l2_clip_norm=clip_norm, batch_argnums=2, keep_batch_dim=False, microbatch_size=size
            )
        )
        return functools.partial(clip, leaves, case.params, case.records, **mask)

    found = {}
    for size in (None, *sizes, 2 * sizes[-1]):
        if size is not None and (size >= n or n % size):
            continue
        found[f"jax_privacy {size}"] = call_of(loss, size)
        found[f"jax_privacy {size}, masked"] = call_of(loss, size, is_padding_example=nobody)
        if case.name == "cnn":
            found[f"products {size}"] = call_of(as_products(loss), size, is_padding_example=nobody)
    return found
