"""DP-SGD in coordinates that public records scale: Kronecker blocks or second moments of their gradients.

A gradient is multiplied by a fixed public matrix before it is clipped and made noisy, so that neither clipping nor
noise is isotropic in the parameters. The matrix is taken once, at the pretrained parameters, and is scaled such that it
tends to the identity, and the method to DP-SGD, as the damping grows; a clip norm thus means about the same for all.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from experiments.baselines.dp_sgd import Hooks, Settings, train
from experiments.data.splits import Records, select

_MOST_RECORDS = 2048  # more would not change the moments by much, and every run takes them
_BLOCK = 64

Path = tuple[str, ...]


class Preconditioned(NamedTuple):
    """Hyperparameters.

    Attributes:
      descent: of the noisy steps; the clip norm is in the scaled coordinates.
      damping: > 0, relative to the mean over parameters; infinite is DP-SGD.
    """

    descent: Settings
    damping: float


class Scaling(NamedTuple):
    """A symmetric matrix on gradients.

    Attributes:
      inputs: for each dense layer with a bias, (in + 1, in + 1), the last row for the bias.
      outputs: for each of these layers, (out, out).
      diagonal: for every other leaf, an array of its shape.
    """

    inputs: dict[Path, Any]
    outputs: dict[Path, Any]
    diagonal: dict[Path, Any]


class Moments(NamedTuple):
    """Sums or means over public records: of squared gradients by leaf, of a a^T and g g^T by dense layer."""

    squares: dict[Path, Any]
    inputs: dict[Path, Any]
    outputs: dict[Path, Any]


def public_kfac(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    public: Records,
    *,
    settings: Preconditioned,
    epsilon: float,
    delta: float,
) -> Any:
    """DP-SGD preconditioned by public KFAC blocks: with P = A (x) G, clips P^{-1/2} g and steps along P^{-1/2} of it.

    A = E[a a^T] and G = E[g g^T] are over public records, a the inputs of a dense layer and a 1, g the gradients of its
    outputs (Martens and Grosse, arXiv:1503.05671, whose damping this is too); here with the records' own labels.
    DP-KFC (arXiv:2605.13418) clips KFAC-preconditioned gradients as well, with factors from synthetic noise; according
    to its abstract public records serve it less well. No formula here is taken from it.

    Simplified: convolutions and the dense layers of a recurrent cell, which are applied more than once, have a diagonal
    in place of blocks, and the factors are not renewed.

    Formal guarantee: (epsilon, delta)-DP, zero-out relation, record level, by `dp_sgd.train`.

    Args:
      seed: of sampling and noise.
      loss_fn: `(params, record) -> scalar`, of a Flax linen model.
      params: pretrained, public: `{"params": {...}}`.
      private: records.
      public: records, as the private ones.
      settings: hyperparameters.
      epsilon: > 0.
      delta: in (0, 1).
    """
    scaling = kfac_blocks(loss_fn, params, public, settings.damping)
    hooks = Hooks(inform=lambda trainable, step: scaling, before=scaled_record, after=scaled)
    return train(seed, loss_fn, params, private, settings=settings.descent, epsilon=epsilon, delta=delta, hooks=hooks)


def adadps(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    public: Records,
    *,
    settings: Preconditioned,
    epsilon: float,
    delta: float,
) -> Any:
    """AdaDPS, Li et al., arXiv:2202.05963: gradients are divided by sqrt(E[g^2]) + damping, then clipped.

    As in the paper the noisy mean of these is the step; it is not divided, nor multiplied back, again.

    Simplified: E[g^2] is over single public records and taken once, where the paper follows the squares of public
    batches' gradients along the iterations, as RMSProp or Adam; at a pretrained model a batch's gradient is mostly
    sampling noise.

    Formal guarantee: (epsilon, delta)-DP, zero-out relation, record level, by `dp_sgd.train`.

    Args:
      seed: of sampling and noise.
      loss_fn: `(params, record) -> scalar`.
      params: pretrained, public: `{"params": {...}}`.
      private: records.
      public: records, as the private ones.
      settings: hyperparameters.
      epsilon: > 0.
      delta: in (0, 1).
    """
    scaling = second_moments(loss_fn, params, public, settings.damping)
    hooks = Hooks(inform=lambda trainable, step: scaling, before=scaled)
    return train(seed, loss_fn, params, private, settings=settings.descent, epsilon=epsilon, delta=delta, hooks=hooks)


def scaled(gradient: dict[Path, jax.Array], scaling: Scaling) -> dict[Path, jax.Array]:
    """The matrix times a gradient, which has the layout of `flatten_dict`."""
    return _moved(gradient, scaling, _product)


def scaled_record(gradient: dict[Path, jax.Array], scaling: Scaling) -> dict[Path, jax.Array]:
    """`scaled`, for the gradient of one record, with vectors in place of matrices: an order of magnitude faster."""
    return _moved(gradient, scaling, _product_of_record)


def _moved(gradient: dict[Path, jax.Array], scaling: Scaling, product: Callable) -> dict[Path, jax.Array]:
    moved = {path: gradient[path] * factor for path, factor in scaling.diagonal.items()}
    for layer, left in scaling.inputs.items():
        kernel, bias = (*layer, "kernel"), (*layer, "bias")
        stacked = product(gradient[kernel], gradient[bias], left, scaling.outputs[layer])
        moved[kernel] = stacked[:-1]
        moved[bias] = stacked[-1]
    return moved


def _product(kernel: jax.Array, bias: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    return left @ jnp.concatenate([kernel, bias[None]]) @ right


def _product_of_record(kernel: jax.Array, bias: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Where the kernel's gradient is a g^T and the bias' is g, since the layer is applied once."""
    square = jnp.sum(bias**2)
    inputs = kernel @ bias / jnp.where(square > 0, square, 1)
    return jnp.outer(left @ jnp.append(inputs, 1), bias @ right)


def second_moments(loss_fn: Any, params: Any, public: Records, damping: float) -> Scaling:
    """AdaDPS' 1 / (sqrt(E[g^2]) + damping), up to a scalar."""
    squares = moments(loss_fn, params, public).squares
    typical = math.sqrt(_mean(squares))
    diagonal = {path: (1 + damping) / (np.sqrt(square) / typical + damping) for path, square in squares.items()}
    return _on_device(Scaling({}, {}, diagonal))


def kfac_blocks(loss_fn: Any, params: Any, public: Records, damping: float) -> Scaling:
    """P^{-1/2} up to a scalar: Kronecker factors of the dense layers, a diagonal of what else there is."""
    found = moments(loss_fn, params, public)
    typical = _mean(found.squares)
    inputs, outputs = {}, {}
    for layer, left in found.inputs.items():
        right = found.outputs[layer]
        # Martens and Grosse's split of the damping: each factor's share is in proportion to its mean eigenvalue.
        ratio = math.sqrt(np.trace(left) / len(left) / max(np.trace(right) / len(right), 1e-30))
        strength = math.sqrt(damping * typical)
        inputs[layer] = math.sqrt(typical * (1 + damping)) * _inverse_root(left, ratio * strength)
        outputs[layer] = _inverse_root(right, strength / ratio)
    blocks = {(*layer, name) for layer in inputs for name in ("kernel", "bias")}
    diagonal = {
        path: np.sqrt((1 + damping) / (square / typical + damping))
        for path, square in found.squares.items()
        if path not in blocks
    }
    return _on_device(Scaling(inputs, outputs, diagonal))


def _on_device(scaling: Scaling) -> Scaling:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), scaling)


def _mean(squares: dict[Path, np.ndarray]) -> float:
    """The mean over all parameters."""
    return sum(square.sum() for square in squares.values()) / sum(square.size for square in squares.values())


def _inverse_root(matrix: np.ndarray, damping: float) -> np.ndarray:
    """(matrix + damping I)^{-1/2} of a semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors / np.sqrt(np.maximum(values, 0) + damping)) @ vectors.T


def moments(loss_fn: Any, params: Any, public: Records) -> Moments:
    """Means over public records, at most `_MOST_RECORDS` of them, at `params`; float64."""
    order = np.random.default_rng(0).permutation(len(public["label"]))[:_MOST_RECORDS]
    total = None
    for start in range(0, len(order), _BLOCK):
        part = _block_moments(params, select(public, order[start : start + _BLOCK]), loss_fn)
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return jax.tree.map(lambda x: x / len(order), total)


@functools.partial(jax.jit, static_argnames="loss_fn")
def _block_moments(params: Any, block: Records, loss_fn: Any) -> Moments:
    per_record = jax.vmap(jax.grad(_with_inputs(loss_fn), has_aux=True), in_axes=(None, 0))
    gradients, inputs = per_record(params, block)
    flat = flatten_dict(gradients)
    outputs = {layer: flat[*layer, "bias"] for layer in inputs}  # a bias' gradient is that of its layer's outputs
    return Moments(
        squares=jax.tree.map(lambda g: jnp.sum(g**2, axis=0), flat),
        inputs={layer: _gram(jnp.pad(a, ((0, 0), (0, 1)), constant_values=1)) for layer, a in inputs.items()},
        outputs={layer: _gram(g) for layer, g in outputs.items()},
    )


def _gram(rows: jax.Array) -> jax.Array:
    return rows.T @ rows


def _with_inputs(loss_fn: Any) -> Callable[[Any, Any], tuple[jax.Array, dict[Path, jax.Array]]]:
    """`(params, record) -> (loss, inputs)`, the inputs (in,) of every dense layer that is applied once."""

    def observed(params: Any, record: Any) -> tuple[jax.Array, dict[Path, jax.Array]]:
        calls: dict[Path, list[jax.Array]] = {}

        def listen(next_fun: Callable, args: Any, kwargs: Any, context: Any) -> Any:
            if _is_plain(context):
                calls.setdefault(("params", *context.module.path), []).append(args[0])
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(listen):
            loss = loss_fn(params, record)
        return loss, {layer: x[0] for layer, x in calls.items() if len(x) == 1 and x[0].ndim == 1}

    return observed


def _is_plain(context: Any) -> bool:
    """Whether it is a dense layer with a bias; not in a recurrent cell, whose inputs exist only inside its loop."""
    module = context.module
    dense = isinstance(module, nn.Dense) and context.method_name == "__call__" and module.use_bias
    return dense and not isinstance(module.parent, nn.RNNCellBase)
