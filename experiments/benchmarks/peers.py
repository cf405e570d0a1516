"""Other libraries' side of the private pass; a library that is not installed is left out with a notice."""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Contestants
from qexp_jax.data.records import num_records
from qexp_jax.model.convolutions import as_products
from qexp_jax.model.subspace import Subspace, tuned_leaves, with_tuned_leaves

# Import name -> the distribution whose version is recorded.
DISTRIBUTIONS = {
    "jax_privacy": "jax_privacy",
    "numpyro": "numpyro",
    "distrax": "distrax",
    "laplax": "laplax",
    "curvlinops": "curvlinops-for-pytorch",
    "opacus": "opacus",
    "torch": "torch",
}


@functools.cache
def find(name: str) -> ModuleType | None:
    """The module, or None and one notice."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"notice: {name} is left out: {error}")
        return None


@functools.cache
def torch_device() -> Any:
    """The torch device beside JAX's, one thread on a CPU; None, with a notice, where torch has none like it."""
    torch = find("torch")
    if torch is None:
        return None
    if jax.devices()[0].platform == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print("notice: torch's peers are left out: this torch has no GPU")
        return None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


def l2_clips(case: Case, space: Subspace, clip_norm: float, sizes: tuple[int, ...]) -> Contestants:
    """The sum of L2-clipped gradients of the tuned leaves, by all who can."""
    found = _jax_privacy(case, space, clip_norm, sizes)
    if find("opacus") is not None and torch_device() is not None:
        from experiments.benchmarks import torch_models

        found |= torch_models.opacus_clips(case, clip_norm, head_only="selected" in space.name)
    return found


def _jax_privacy(case, space, clip_norm, sizes):
    """At once and in microbatches, each also with a mask, with which XLA compiles convolutions to something faster.

    And, where there are convolutions, as the products that ours are.
    """
    library = find("jax_privacy")
    if library is None:
        return {}
    layout, leaves = space.layout, tuned_leaves(space.layout, case.params)
    loss = lambda leaves, params, record: case.loss_fn(with_tuned_leaves(layout, params, leaves), record)
    n = num_records(case.records)
    nobody = jnp.zeros(n, bool)

    def contestant(loss, size, **mask):
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
        found[f"jax_privacy {size}"] = contestant(loss, size)
        found[f"jax_privacy {size}, masked"] = contestant(loss, size, is_padding_example=nobody)
        if case.name == "cnn":
            found[f"products {size}"] = contestant(as_products(loss), size, is_padding_example=nobody)
    return found


def as_torch(array: Any) -> Any:
    """A tensor of these numbers beside JAX's device."""
    torch = find("torch")
    values = np.array(array)
    return torch.from_numpy(values.astype(np.int64) if values.dtype.kind == "i" else values).to(torch_device())
