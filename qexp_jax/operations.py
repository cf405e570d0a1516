"""Floating-point operations of a trace: shapes decide, nothing is computed.

XLA's own count leaves out how often a loop turns.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

_MOVES = {
    "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "dynamic_slice", "dynamic_update_slice",
    "concatenate", "pad", "gather", "select_n", "convert_element_type", "copy", "iota", "rev", "bitcast_convert_type",
}  # fmt: skip


def count_flops(function: Any, *args: Any, products_only: bool = False) -> float:
    """Floating-point operations of `function` on arguments of these shapes.

    A scan counts its body once a turn, a loop of unknown length once, and of branches the dearest counts.

    Args:
      function: traced, not run.
      *args: arrays or their shapes.
      products_only: count matrix products and convolutions alone.

    >>> count_flops(lambda a, b: jnp.tanh(a @ b), jnp.zeros((2, 3)), jnp.zeros((3, 5)))
    70
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr, products_only)


def _flops(jaxpr, products_only):
    return sum(_flops_of(equation, products_only) for equation in jaxpr.eqns)


def _flops_of(equation, products_only):
    name, params = equation.primitive.name, equation.params
    inner = [_flops(jaxpr, products_only) for jaxpr in jaxprs_in_params(params)]
    if inner:
        return params["length"] * sum(inner) if name == "scan" else max(inner) if name == "cond" else sum(inner)
    out = equation.outvars[0].aval if equation.outvars else None
    size = math.prod(getattr(out, "shape", ()))
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return 2 * size * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    counts = not products_only and out is not None and name not in _MOVES and jnp.issubdtype(out.dtype, jnp.floating)
    return size if counts else 0
