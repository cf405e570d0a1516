"""What a trace says of a function: operations, bytes, and what its derivative depends on; nothing is computed.

XLA's own count of operations leaves out how often a loop turns.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

# Primitives that copy and rearrange numbers, and compute none.
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

    def slopes(cotangent: Any, arguments: list[Any], *others: Any) -> Any:
        _, pull_back = jax.vjp(lambda x: function(x, *others), arguments)
        return pull_back(cotangent)[0]

    result = jax.eval_shape(function, arguments, *others)
    # A derivative that is not zero for all numbers is a function of the cotangent, the first argument.
    jaxpr = jax.make_jaxpr(slopes)(result, arguments, *others).jaxpr
    return _reached(jaxpr, jaxpr.invars[:1])


def _reached(jaxpr: Jaxpr, variables: list[Any]) -> tuple[bool, ...]:
    """Which results depend on one of the variables; a function that is called depends on all that it is given."""
    seen: set[Any] = set(variables)
    for equation in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in seen for x in equation.invars):
            seen.update(equation.outvars)
    return tuple(not isinstance(x, Literal) and x in seen for x in jaxpr.outvars)


def has_reverse_rule(function: Any, *args: Any) -> bool:
    """Whether the function has a derivative of its own that is defined for reverse mode alone (`jax.custom_vjp`)."""
    return _has_reverse_rule(jax.make_jaxpr(function)(*args).jaxpr)


def _has_reverse_rule(jaxpr: Jaxpr) -> bool:
    inner = (x for equation in jaxpr.eqns for x in jaxprs_in_params(equation.params))
    return any(e.primitive.name == "custom_vjp_call" for e in jaxpr.eqns) or any(map(_has_reverse_rule, inner))


def _total(jaxpr: Jaxpr, count: Callable[[JaxprEqn], int]) -> int:
    return sum(_count(equation, count) for equation in jaxpr.eqns)


def _count(equation: JaxprEqn, count: Callable[[JaxprEqn], int]) -> int:
    name = equation.primitive.name
    inner = [_total(jaxpr, count) for jaxpr in jaxprs_in_params(equation.params)]
    if not inner:
        return count(equation)
    if name == "scan":
        return equation.params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    return sum(inner)


def _bytes(equation: JaxprEqn) -> int:
    # Tokens of effects have neither shape nor bytes.
    avals: list[Any] = [v.aval for v in equation.outvars]
    shaped = [aval for aval in avals if hasattr(aval, "shape") and hasattr(aval.dtype, "itemsize")]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in shaped)


def _flops(equation: JaxprEqn) -> int:
    out: Any = equation.outvars[0].aval if equation.outvars else None
    if out is None or equation.primitive.name in _MOVES or not jnp.issubdtype(out.dtype, jnp.floating):
        return 0
    # What is not a product counts one operation a number, be it a sum or a tangent.
    return _product_flops(equation) or math.prod(out.shape)


def _product_flops(equation: JaxprEqn) -> int:
    name = equation.primitive.name
    params = equation.params
    out = equation.outvars[0].aval if equation.outvars else None
    factors: list[Any] = [v.aval for v in equation.invars]
    size = math.prod(getattr(out, "shape", ()))
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * size * math.prod(factors[0].shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = factors[1].shape
        channels_out = kernel[params["dimension_numbers"].rhs_spec[0]]
        # Each number of the result takes a product with the part of the kernel that belongs to its channel.
        return 2 * size * math.prod(kernel) // channels_out
    return 0
