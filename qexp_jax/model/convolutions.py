"""Convolutions as matrix products, for CPUs and GPUs.

The fast libraries want one kernel for all records. With a kernel gradient or a tangent of its own for each record, as
in per-record gradients and Hessian-vector products, XLA falls back to plain loops on a CPU (also inside any scan),
three to ten times slower, and to grouped convolutions on a GPU, nine times slower on an H200. A matrix product is fast
everywhere; so the functions of this package differentiate a loss whose convolutions are gathered patches times the
kernel. The numbers are the same up to rounding. A convolution that is not differentiated, as before a head that is
tuned alone, has one kernel for all records, and on a GPU stays as it is: twice as fast on an H200. On other devices
nothing is changed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

_ALL = ("cpu",)  # where all convolutions are rewritten
_DIFFERENTIATED = ("gpu",)  # where those are that are differentiated
_MOST_TAPS = 64  # kernels larger than 8 x 8 would be too many slices


def as_products(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with its convolutions as matrix products where the default device is a CPU or a GPU, else `fn` itself.

    Args:
      fn: a function of pytrees of arrays, for instance a loss of one record, that is differentiated in its first
        argument. What it calls under `jax.jit` is rewritten too, what it calls under other transformations stays as it
        is.
    """
    device = jax.default_backend()
    if device not in _ALL + _DIFFERENTIATED:
        return fn
    return _rewritten(fn, rewrite_all=device in _ALL)


def _rewritten(fn: Callable[..., Any], rewrite_all: bool) -> Callable[..., Any]:
    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        num_differentiated = len(jax.tree.leaves(args[0]))
        moving = None if rewrite_all else set(closed.jaxpr.invars[:num_differentiated])
        jaxpr = _rewrite(closed.jaxpr, moving)
        if jaxpr is closed.jaxpr:
            return fn(*args)
        results = jaxpr_as_fun(closed.replace(jaxpr=jaxpr))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return run


def _rewrite(jaxpr: Jaxpr, moving: set[Any] | None) -> Jaxpr:
    """The same jaxpr if it has no convolution to be rewritten: of `moving` variables, and what is made of them, or any.

    A function that is called depends on all of its arguments if on one.
    """
    equations = []
    for equation in jaxpr.eqns:
        moves = moving is None or any(_moves(v, moving) for v in equation.invars)
        equations.append(_rewrite_equation(equation, moving) if moves else equation)
        if moving is not None and moves:
            moving.update(equation.outvars)
    same = all(new is old for new, old in zip(equations, jaxpr.eqns, strict=True))
    return jaxpr if same else jaxpr.replace(eqns=equations)


def _moves(variable: Any, moving: set[Any] | None) -> bool:
    if moving is None:
        return True
    # A literal is a number in the text of the trace: it depends on nothing, and is not hashable.
    return not isinstance(variable, Literal) and variable in moving


def _rewrite_equation(equation: JaxprEqn, moving: set[Any] | None) -> JaxprEqn:
    name = equation.primitive.name
    params = equation.params
    if name == "conv_general_dilated" and _is_plain(equation):
        # Under jit the product is one equation, which takes the convolution's place among the others.
        product = jax.jit(functools.partial(_product, params=params))
        (call,) = jax.make_jaxpr(product)(*[v.aval for v in equation.invars]).jaxpr.eqns
        return call.replace(invars=equation.invars, outvars=equation.outvars)
    if name in ("jit", "pjit"):
        closed = params["jaxpr"]
        called = closed.jaxpr
        # The called function has variables of its own: those move that stand for moving arguments.
        inside = {v for v, x in zip(called.invars, equation.invars, strict=True) if _moves(x, moving)}
        inner = _rewrite(called, None if moving is None else inside)
        if inner is not called:
            return equation.replace(params=params | {"jaxpr": closed.replace(jaxpr=inner)})
    return equation


def _is_plain(equation: JaxprEqn) -> bool:
    """Whether `_product` can do it: one group, an input that is not dilated, and not too many taps."""
    params = equation.params
    kernel: Any = equation.invars[1].aval
    taps = math.prod(kernel.shape[i] for i in params["dimension_numbers"].rhs_spec[2:])
    is_grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
    is_dilated = any(d != 1 for d in params["lhs_dilation"])  # a transposed convolution
    return not is_grouped and not is_dilated and taps <= _MOST_TAPS


def _product(lhs: jax.Array, rhs: jax.Array, params: dict[str, Any]) -> jax.Array:
    """The convolution: a strided slice of the input for each tap of the kernel, side by side, times the kernel."""
    spec = params["dimension_numbers"]
    x = jnp.transpose(lhs, (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))  # records, space, channels
    kernel = jnp.transpose(rhs, (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0]))  # space, in, out
    # `lax.pad` also takes negative padding, which crops, as a convolution does.
    padding = [(0, 0, 0), *[(low, high, 0) for low, high in params["padding"]], (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
    taps = np.ndindex(*kernel.shape[:-2])
    patches = jnp.concatenate([_slice(x, tap, kernel, params) for tap in taps], axis=-1)
    out = jax.lax.dot_general(
        patches,
        kernel.reshape(-1, kernel.shape[-1]),
        (((patches.ndim - 1,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    order = (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    return jnp.transpose(out, np.argsort(order).tolist())  # the inverse permutation


def _slice(x: jax.Array, tap: tuple[int, ...], kernel: jax.Array, params: dict[str, Any]) -> jax.Array:
    """What one tap of the kernel meets, in all places: of the padded input (n, *space, channels) at the strides."""
    strides = params["window_strides"]
    dilation = params["rhs_dilation"]
    starts = [i * d for i, d in zip(tap, dilation, strict=True)]
    # Not strict: the kernel's shape ends with its two axes of channels.
    reach = [(k - 1) * d for k, d in zip(kernel.shape, dilation, strict=False)]
    counts = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
    stops = [a + (c - 1) * s + 1 for a, c, s in zip(starts, counts, strides, strict=True)]
    return jax.lax.slice(x, (0, *starts, 0), (x.shape[0], *stops, x.shape[-1]), (1, *strides, 1))
