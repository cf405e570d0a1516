"""What a trace says of a function: operations, bytes, and what its derivative depends on; nothing is computed.

XLA's own count of operations leaves out how often a loop turns.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

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
    flops = _product_flops if products_only else _flops
    return _total(jax.make_jaxpr(function)(*args).jaxpr, flops)


def count_bytes(function: Any, *args: Any) -> float:
    """Bytes of all that `function` forms on arguments of these shapes; its backward pass keeps at most twice that.

    Loops and branches count as in `count_flops`.

    >>> count_bytes(lambda a, b: jnp.tanh(a @ b), jnp.zeros((2, 3)), jnp.zeros((3, 5)))
    80
    """
    return _total(jax.make_jaxpr(function)(*args).jaxpr, _bytes)


def moving_arguments(function: Any, arguments: list[Any], *others: Any) -> tuple[bool, ...]:
    """Of each of the `arguments`, whether the derivative by it can be anything but zero, whatever the numbers are.

    Args:
      function: `(arguments, *others) -> array`, traced, not run.
      arguments: arrays of floats, or their shapes.
      *others: pytrees of arrays or shapes.

    >>> one = jnp.ones(())
    >>> moving_arguments(lambda x, y: x[0] * y + jax.lax.stop_gradient(x[1]), [one, one], one)
    (True, False)
    """

    def slopes(cotangent, arguments, *others):
        return jax.vjp(lambda x: function(x, *others), arguments)[1](cotangent)[0]

    result = jax.eval_shape(function, arguments, *others)
    jaxpr = jax.make_jaxpr(slopes)(result, arguments, *others).jaxpr
    return _reached(jaxpr, jaxpr.invars[:1])


def _reached(jaxpr, variables):
    """Which results depend on one of the variables; a function that is called depends on all that it is given."""
    seen = set(variables)
    for equation in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in seen for x in equation.invars):
            seen.update(equation.outvars)
    return tuple(not isinstance(x, Literal) and x in seen for x in jaxpr.outvars)


def has_reverse_rule(function: Any, *args: Any) -> bool:
    """Whether the function has a derivative of its own that is defined for reverse mode alone (`jax.custom_vjp`)."""
    return _has_reverse_rule(jax.make_jaxpr(function)(*args).jaxpr)


def _has_reverse_rule(jaxpr):
    inner = (x for equation in jaxpr.eqns for x in jaxprs_in_params(equation.params))
    return any(e.primitive.name == "custom_vjp_call" for e in jaxpr.eqns) or any(map(_has_reverse_rule, inner))


def _total(jaxpr, count):
    return sum(_count(equation, count) for equation in jaxpr.eqns)


def _count(equation, count):
    name, params = equation.primitive.name, equation.params
    inner = [_total(jaxpr, count) for jaxpr in jaxprs_in_params(params)]
    if inner:
        return params["length"] * sum(inner) if name == "scan" else max(inner) if name == "cond" else sum(inner)
    return count(equation)


def _bytes(equation):
    shaped = [v.aval for v in equation.outvars if hasattr(v.aval, "shape") and hasattr(v.aval.dtype, "itemsize")]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in shaped)


def _flops(equation):
    out = equation.outvars[0].aval if equation.outvars else None
    if out is None or equation.primitive.name in _MOVES or not jnp.issubdtype(out.dtype, jnp.floating):
        return 0
    return _product_flops(equation) or math.prod(out.shape)


def _product_flops(equation):
    name, params = equation.primitive.name, equation.params
    out = equation.outvars[0].aval if equation.outvars else None
    size = math.prod(getattr(out, "shape", ()))
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return 2 * size * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    return 0
