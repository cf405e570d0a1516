"""DP-SGD whose steps also use the gradient of a public batch: mixed in, as a mirror map, or as the centre of clipping.

A step's public batch is drawn without replacement, by a generator of its own: the private sampling stays secret.
Everything is in units of the clip norm C, as in `dp_sgd`: m is the noisy mean of clipped private gradients over C, and
p the mean public gradient, which is not clipped.

    mixing             alpha m + (1 - alpha) p / C
    mirror descent     alpha_t m + (1 - alpha_t) p / C,  alpha_t = cos(pi t / 2K)
    DOPE-SGD           m' + p / C,  m' with the gradients g - p in place of g
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from experiments.baselines.dp_sgd import Hooks, Settings, train
from experiments.data.splits import Records, select


class Mixing(NamedTuple):
    """Hyperparameters.

    Attributes:
      descent: of the noisy steps.
      weight: alpha in [0, 1], of the private gradient; 1 is DP-SGD.
      public_batch: public records in a step.
    """

    descent: Settings
    weight: float
    public_batch: int = 256


class Mirror(NamedTuple):
    """Hyperparameters.

    Attributes:
      descent: of the noisy steps.
      horizon: K / steps >= 1: 1 ends on public gradients alone, infinity is DP-SGD.
      public_batch: public records in a step.
    """

    descent: Settings
    horizon: float
    public_batch: int = 256


class Centred(NamedTuple):
    """Hyperparameters.

    Attributes:
      descent: of the noisy steps; the clip norm is that of differences from the public gradient.
      public_batch: public records in a step.
    """

    descent: Settings
    public_batch: int = 256


class _Told(NamedTuple):
    """What a step is told: the mean public gradient, C, and the weight of the private gradient."""

    gradient: Any
    l2_clip_norm: float
    weight: float


def mixed_gradients(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    public: Records,
    *,
    settings: Mixing,
    epsilon: float,
    delta: float,
) -> Any:
    """Steps along a convex combination of the noisy private and the public gradient: Lowy et al., arXiv:2306.15056.

    Simplified: one constant weight, chosen as any hyperparameter; public gradients are not clipped, where their code
    may clip them as the private ones.

    Formal guarantee: (epsilon, delta)-DP, zero-out relation, record level, by `dp_sgd.train`.

    Args:
      seed: of sampling, noise and public batches.
      loss_fn: `(params, record) -> scalar`.
      params: pretrained, public.
      private: records.
      public: records, as the private ones.
      settings: hyperparameters.
      epsilon: > 0.
      delta: in (0, 1).
    """
    inform = _informer(seed, loss_fn, public, settings, lambda step: settings.weight)
    hooks = Hooks(inform=inform, after=_mix)
    return train(seed, loss_fn, params, private, settings=settings.descent, epsilon=epsilon, delta=delta, hooks=hooks)


def mirror_descent(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    public: Records,
    *,
    settings: Mirror,
    epsilon: float,
    delta: float,
) -> Any:
    """PDA-DPMD, Amid et al., arXiv:2112.00193, in its first-order approximation, with which its networks were trained.

    The mirror map is the public loss. The exact step, which minimises a Bregman divergence, is not taken: the
    approximation mixes in the public gradient with a weight that rises along a cosine, and applies to any model. It
    starts as DP-SGD.

    Formal guarantee: (epsilon, delta)-DP, zero-out relation, record level, by `dp_sgd.train`.

    Args:
      seed: of sampling, noise and public batches.
      loss_fn: `(params, record) -> scalar`.
      params: pretrained, public.
      private: records.
      public: records, as the private ones.
      settings: hyperparameters.
      epsilon: > 0.
      delta: in (0, 1).
    """
    inform = _informer(seed, loss_fn, public, settings, functools.partial(cosine_weight, settings))
    hooks = Hooks(inform=inform, after=_mix)
    return train(seed, loss_fn, params, private, settings=settings.descent, epsilon=epsilon, delta=delta, hooks=hooks)


def cosine_weight(settings: Mirror, step: int) -> float:
    """alpha_t of the private gradient."""
    return float(np.cos(np.pi * step / (2 * settings.horizon * settings.descent.steps)))


def dope_sgd(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    public: Records,
    *,
    settings: Centred,
    epsilon: float,
    delta: float,
) -> Any:
    """DOPE-SGD, Nasr et al., ICML 2023 (PMLR 202): private gradients are clipped around the public one.

    The public gradient is added back to the mean over the *expected* batch, once, whatever the batch's actual size: a
    record that is zeroed out contributes nothing to the sum, where one that is there contributes at most C.

    Simplified: the clipping alone; the paper also synthesises public records by augmentation and generative models, and
    makes ensembles of iterates.

    Formal guarantee: (epsilon, delta)-DP, zero-out relation, record level, by `dp_sgd.train`.

    Args:
      seed: of sampling, noise and public batches.
      loss_fn: `(params, record) -> scalar`.
      params: pretrained, public.
      private: records.
      public: records, as the private ones.
      settings: hyperparameters.
      epsilon: > 0.
      delta: in (0, 1).
    """
    inform = _informer(seed, loss_fn, public, settings, lambda step: 1.0)
    hooks = Hooks(inform=inform, before=_from_centre, after=_back_to_centre)
    return train(seed, loss_fn, params, private, settings=settings.descent, epsilon=epsilon, delta=delta, hooks=hooks)


def _mix(direction: Any, told: _Told) -> Any:
    public = jax.tree.map(lambda p: p / told.l2_clip_norm, told.gradient)
    return jax.tree.map(lambda m, p: told.weight * m + (1 - told.weight) * p, direction, public)


def _from_centre(gradient: Any, told: _Told) -> Any:
    return jax.tree.map(jnp.subtract, gradient, told.gradient)


def _back_to_centre(direction: Any, told: _Told) -> Any:
    return jax.tree.map(lambda m, p: m + p / told.l2_clip_norm, direction, told.gradient)


def _informer(
    seed: int, loss_fn: Any, public: Records, settings: Mixing | Mirror | Centred, weight: Callable[[int], float]
) -> Callable[[Any, int], _Told]:
    """What each step is told, of a fresh public batch."""
    rng = np.random.default_rng([seed, 1])  # not the generator of the private sampling
    count = len(public["label"])
    size = min(settings.public_batch, count)

    def inform(trainable: Any, step: int) -> _Told:
        batch = select(public, rng.choice(count, size, replace=False))
        return _Told(_mean_gradient(trainable, batch, loss_fn), settings.descent.l2_clip_norm, weight(step))

    return inform


@functools.partial(jax.jit, static_argnames="loss_fn")
def _mean_gradient(trainable: Any, batch: Records, loss_fn: Any) -> Any:
    """Of the parameters in the layout of `flatten_dict`."""

    def mean_loss(trainable: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(unflatten_dict(trainable), batch))

    return jax.grad(mean_loss)(trainable)
