"""Gradients of single records as outer products: a + b numbers of each in place of a times b.

The gradient of a matrix that a loss multiplies with one vector, as a dense layer does, is the outer product of that
vector and the derivative by the product. Its norm is the product of two norms, a weighted sum over records is one
matrix product (Goodfellow, arXiv:1510.01799), and along directions that have the same form (`directions`) it costs a
tenth of the arithmetic. Which matrices are used so is read off the trace of the loss; other gradients are formed whole.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from qexp_jax.data.records import Record, vary

# By default accelerators round the factors of a product to fewer bits, for which the rounding bounds have no room.
_HIGHEST = jax.lax.Precision.HIGHEST
_LONG = 64  # of an axis; where none is longer, whole gradients are as fast
_SMALLEST = 1e-37  # its inverse is a float32 as well
BLOCK = 2**15  # terms of a sum of squares that are added one after the other, see `rounding.of_sum`


class Outer(NamedTuple):
    """Gradients of an (a, b) matrix by each of m records, left_i right_i^T.

    Attributes:
      left: (m, a); of a single record (a,).
      right: (m, b); of a single record (b,).
    """

    left: jax.Array
    right: jax.Array


# Gradients of m records (m, k) in parts, side by side: some of the columns (m, c), or outer products of a b = c.
Rows = list[jax.Array | Outer]


def is_wide(shape: tuple[int, ...]) -> bool:
    """Whether a leaf is a matrix of whose gradients outer products save much."""
    return len(shape) == 2 and min(shape) > 1 and max(shape) > _LONG


def gradient(
    loss: Callable[[list[jax.Array], Record], jax.Array],
    leaves: list[jax.Array],
    record: Record,
    axis_name: str | None = None,
) -> Rows:
    """The gradient of one record: of each leaf an `Outer` of two vectors, or all numbers in one.

    Args:
      loss: of one record.
      leaves: what it is differentiated by.
      record: one.
      axis_name: mapped device axis, if any, over which the leaves vary; see `records.vary`.
    """
    trace = _traced(loss, leaves, record)
    products = _products(trace, leaves)
    if not products:
        return [x.ravel() for x in jax.grad(loss)(leaves, record)]
    formed = {i: x for i, x in enumerate(leaves) if i not in products}
    # The derivative by what is added to a product is that by the product.
    shapes = {i: _result_aval(step).shape for i, step in products.items()}
    nothing = {i: jnp.zeros(shape, leaves[i].dtype) for i, shape in shapes.items()}

    def run(formed: dict[int, jax.Array], added: dict[int, jax.Array]) -> tuple[jax.Array, dict[int, jax.Array]]:
        arguments = [formed.get(i, x) for i, x in enumerate(leaves)] + jax.tree.leaves(record)
        added_to = {products[i].outputs[0]: x for i, x in added.items()}
        value, env = _run(trace, arguments, added_to)
        factors = {i: _value(env, _factor(step, i)).ravel() for i, step in products.items()}
        return value, factors

    # The zeros vary over the axis as the leaves do, or a derivative by them would be summed over the devices.
    slopes, factors = jax.grad(run, argnums=(0, 1), has_aux=True)(formed, vary(nothing, axis_name))
    by_formed, by_added = slopes
    parts: dict[int, Any] = {i: x.ravel() for i, x in by_formed.items()}
    for i, step in products.items():
        factor = factors[i]
        slope = by_added[i].ravel()
        # The factor has the length of the axis that is summed over, the derivative that of the other axis.
        parts[i] = Outer(factor, slope) if _contracted(step, i) == 0 else Outer(slope, factor)
    return [parts[i] for i in range(len(leaves))]


def whole(rows: Rows) -> jax.Array:
    """(m, k), formed."""
    return jnp.concatenate([_formed(x) if isinstance(x, Outer) else x for x in rows], axis=1)


def _formed(part: Outer) -> jax.Array:
    return (part.left[:, :, None] * part.right[:, None, :]).reshape(len(part.left), -1)


def squares(rows: Rows, scale: jax.Array | float) -> jax.Array:
    """(m,) squared norms of m gradients times `scale`, which is to bring those that matter near one."""
    # The one norm of an outer product stands for all of its numbers.
    of_parts = [(_norms(x.left) * _norms(x.right))[:, None] if isinstance(x, Outer) else x for x in rows]
    return jnp.sum(jnp.stack([sum_of_squares(x * scale) for x in of_parts]), axis=0)


def norms(rows: Rows) -> jax.Array:
    """(m,) Euclidean norms of m gradients of any size, scaled before they are squared; infinite beyond 1e37."""
    of_parts = [_norms(x.left) * _norms(x.right) if isinstance(x, Outer) else _norms(x) for x in rows]
    return _norms(jnp.stack(of_parts, axis=1))


def _inverse(x: jax.Array) -> jax.Array:
    """1/x of norms, at most 1e37: a gradient times it has length one, or less if it is hardly a float."""
    return 1 / jnp.clip(x, _SMALLEST, 1 / _SMALLEST)


def sum_of_squares(x: jax.Array) -> jax.Array:
    """(m,) of rows (m, k), in blocks, so that the error does not grow with k."""
    whole = x.shape[1] // BLOCK * BLOCK
    if not whole:
        return jnp.sum(x**2, axis=1)
    blocks = jnp.sum(x[:, :whole].reshape(len(x), -1, BLOCK) ** 2, axis=2)
    return jnp.sum(blocks, axis=1) + jnp.sum(x[:, whole:] ** 2, axis=1)


def _norms(x: jax.Array) -> jax.Array:
    """(m,) of rows (m, k)."""
    # Squares of numbers beyond 1e19 overflow and those of tiny ones vanish: the largest is brought to one first.
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0)
    scale = _inverse(largest)
    found = jnp.sqrt(sum_of_squares(x * scale)) / scale[:, 0]
    # Beyond, its inverse would not be a normal number, which some devices take for zero.
    return jnp.where(found > 1 / _SMALLEST, jnp.inf, found)


def grouped_sums(part: Outer, weights: jax.Array, keep: jax.Array, size: int) -> jax.Array:
    """sum_i weights_i left_i right_i^T over groups of `size` rows, flat, (groups, a b).

    Of rows that are not kept nothing is looked at, not even NaN. A sum of s terms is off by at most s times 2^-24 of
    the sum of their absolute values: short ones are added up further in integers.

    Args:
      part: m outer products.
      weights: (m,), finite.
      keep: bool (m,).
      size: rows of a group.
    """
    left_norms = _norms(part.left)[:, None]
    right_norms = _norms(part.right)[:, None]
    keep = keep[:, None]
    # By `where` rather than by a factor of zero, for zero times NaN is NaN.
    weights = jnp.where(keep, weights[:, None] * left_norms * right_norms, 0)
    # Of length one, for the product of a huge factor and a weight may overflow where the other factor is tiny.
    left = jnp.where(keep, part.left * _inverse(left_norms), 0) * weights
    right = jnp.where(keep, part.right * _inverse(right_norms), 0)
    left = _in_groups(left, size)
    right = _in_groups(right, size)
    sums = jnp.einsum("gma,gmb->gab", left, right, precision=_HIGHEST)
    return sums.reshape(len(sums), -1)


def _in_groups(x: jax.Array, size: int) -> jax.Array:
    """Rows (m, c) as (groups, size, c), the last group filled up with zeros."""
    missing = -len(x) % size
    return jnp.pad(x, ((0, missing), (0, 0))).reshape(-1, size, x.shape[1])


# --- the trace of a loss ---


class _Step(NamedTuple):
    """An equation; its inputs and outputs are numbers of values, or inputs are literals."""

    equation: JaxprEqn
    inputs: list[Any]
    outputs: list[int]


class _Trace(NamedTuple):
    """The arguments are the values 0, 1, ...; what is constant is known."""

    jaxpr: Jaxpr
    steps: list[_Step]
    known: dict[int, Any]
    output: Any


def _traced(loss: Callable[..., jax.Array], leaves: list[jax.Array], record: Record) -> _Trace:
    closed = jax.make_jaxpr(loss)(leaves, record)
    numbers = itertools.count()
    # Not strict: the numbers have no end.
    names: dict[Any, Any] = dict(zip(closed.jaxpr.invars, numbers, strict=False))
    trace = _Trace(closed.jaxpr, [], {}, None)
    _inline(closed, names, numbers, trace)
    return trace._replace(output=_named(names, closed.jaxpr.outvars[0]))


def _inline(closed: ClosedJaxpr, names: dict[Any, Any], numbers: Iterator[int], trace: _Trace) -> None:
    """Appends the steps of a jaxpr, with those of the functions that it calls under `jax.jit` in their place.

    Args:
      closed: the jaxpr.
      names: of its variables, those of its arguments at first; the others are added.
      numbers: that no value has yet.
      trace: what is appended to.
    """
    for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        names[variable] = next(numbers)
        trace.known[names[variable]] = value
    for equation in closed.jaxpr.eqns:
        inputs = [_named(names, x) for x in equation.invars]
        if equation.primitive.name in ("jit", "pjit"):
            called = equation.params["jaxpr"]
            # A function that is called twice is one jaxpr: each call has names of its own.
            inner: dict[Any, Any] = dict(zip(called.jaxpr.invars, inputs, strict=True))
            _inline(called, inner, numbers, trace)
            outputs = [_named(inner, x) for x in called.jaxpr.outvars]
        else:
            outputs = [next(numbers) for _ in equation.outvars]
            trace.steps.append(_Step(equation, inputs, outputs))
        names.update(zip(equation.outvars, outputs, strict=True))


def _named(names: dict[Any, Any], variable: Any) -> Any:
    return variable if isinstance(variable, Literal) else names[variable]


def _products(trace: _Trace, leaves: list[jax.Array]) -> dict[int, _Step]:
    """The step of each wide leaf that the loss uses in one product with one vector, and nowhere else."""
    # The leaves are the first arguments, so that leaf i is value i.
    uses = Counter(x for step in trace.steps for x in step.inputs if not isinstance(x, Literal))
    wide = {i for i, x in enumerate(leaves) if is_wide(x.shape) and uses[i] == 1 and trace.output != i}
    steps = [(i, step) for step in trace.steps for i in wide if i in step.inputs]
    return {i: step for i, step in steps if _is_with_a_vector(step, i, leaves[i])}


def _result_aval(step: _Step) -> Any:
    """Shape and dtype of its only output."""
    return step.equation.outvars[0].aval


def _is_with_a_vector(step: _Step, i: int, leaf: jax.Array) -> bool:
    equation = step.equation
    if equation.primitive.name != "dot_general":
        return False
    other: Any = equation.invars[1 - step.inputs.index(i)].aval
    contracted, batched = equation.params["dimension_numbers"]
    is_one_dtype = leaf.dtype == other.dtype == _result_aval(step).dtype
    sums_one_axis = len(contracted[0]) == 1 and not batched[0]
    # A size, not a rank: a matrix of one row is a vector too.
    return is_one_dtype and sums_one_axis and other.size == leaf.shape[_contracted(step, i)]


def _factor(step: _Step, i: int) -> Any:
    """What the leaf is multiplied with."""
    return step.inputs[1 - step.inputs.index(i)]


def _contracted(step: _Step, i: int) -> int:
    """The axis of the leaf that the product sums over."""
    contracted, _ = step.equation.params["dimension_numbers"]
    return contracted[step.inputs.index(i)][0]


def _run(trace: _Trace, arguments: list[Any], added: dict[int, jax.Array]) -> tuple[Any, dict[int, Any]]:
    """The output of a trace, and all values by their numbers; to some of them something is added."""
    env = trace.known | dict(enumerate(arguments))
    for step in trace.steps:
        env.update(zip(step.outputs, _results(trace.jaxpr, step, env), strict=True))
        env.update({x: env[x] + added[x] for x in step.outputs if x in added})
    return _value(env, trace.output), env


def _results(jaxpr: Jaxpr, step: _Step, env: dict[int, Any]) -> list[Any]:
    """What one equation gives, as a jaxpr of its own."""
    # A jaxpr is evaluated with what each primitive needs to be bound, also those that hold functions.
    inputs = zip(step.equation.invars, step.inputs, strict=True)
    given = {variable: _value(env, x) for variable, x in inputs if not isinstance(variable, Literal)}
    alone = jaxpr.replace(constvars=[], invars=[*given], outvars=[*step.equation.outvars], eqns=[step.equation])
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*given.values())


def _value(env: dict[int, Any], name: Any) -> Any:
    return name.val if isinstance(name, Literal) else env[name]
