"""Which other libraries are installed, and torch beside JAX's device."""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import numpy as np

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
    # JAX's side is in float32 too.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")


def as_torch(array: Any) -> Any:
    """A tensor of these numbers beside JAX's device."""
    torch = find("torch")
    values = np.array(array)
    return torch.from_numpy(values.astype(np.int64) if values.dtype.kind == "i" else values).to(torch_device())
