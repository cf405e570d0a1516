"""DP-SGD as published for fine-tuning: a fixed recipe with averaged parameters, and automatic clipping.

Neither needs public records beyond the pretrained parameters.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.baselines.dp_sgd import Hooks, Settings, train
from experiments.data.splits import Records


class Recipe(NamedTuple):
    """Settings of De et al.'s fine-tuning on CIFAR: 250 batches of 16,384 of 50,000 records, rate 1, clip norm 1.

    Attributes:
      descent: of the noisy steps.
      decay: of the exponential moving average of the parameters; 0 is the last iterate.
    """

    descent: Settings = Settings(sampling_prob=0.33, steps=250, length=250.0, l2_clip_norm=1.0)
    decay: float = 0.9


def published_recipe(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    *,
    epsilon: float,
    delta: float,
    recipe: Recipe = Recipe(),  # noqa: B008  # a tuple
) -> Any:
    """Fine-tunes all parameters as De et al., arXiv:2204.13650: no setting is chosen.

    Unit-norm gradients, a constant rate, averaged parameters. Left out: augmentation multiplicity (their sixteen flips
    and crops of an image) and what concerns architectures. Their released configuration averages with decay .9999, but
    the warm-up that it shares with ours keeps the decay of 250 steps below .97.

    Formal guarantee: (epsilon, delta)-DP, zero-out relation, record level, by `dp_sgd.train`; averaging reads only what
    is released.

    Args:
      seed: of sampling and noise.
      loss_fn: `(params, record) -> scalar`.
      params: pretrained, public.
      private: records.
      epsilon: > 0.
      delta: in (0, 1).
      recipe: the settings.
    """
    return train(
        seed, loss_fn, params, private,
        settings=recipe.descent, epsilon=epsilon, delta=delta, summary=averaged(recipe.decay),
    )  # fmt: skip


def automatic_clipping(
    seed: int,
    loss_fn: Any,
    params: Any,
    private: Records,
    *,
    epsilon: float,
    delta: float,
    recipe: Recipe = Recipe(),  # noqa: B008
    gamma: float = 0.01,
) -> Any:
    """The recipe with gradients g / (|g| + gamma) in place of clipped ones: Bu et al., arXiv:2206.07136 (AUTO-S).

    A record's normalised gradient is shorter than 1, so that clipping it at 1, as is done here, changes nothing but
    keeps jax_privacy's guarantee for gradients that are not finite. The recipe's clip norm is not used.

    Formal guarantee: (epsilon, delta)-DP, zero-out relation, record level, by `dp_sgd.train`.

    Args:
      seed: of sampling and noise.
      loss_fn: `(params, record) -> scalar`.
      params: pretrained, public.
      private: records.
      epsilon: > 0.
      delta: in (0, 1).
      recipe: the other settings.
      gamma: > 0, the norm below which a gradient is shortened rather than normalised.
    """
    hooks = Hooks(inform=lambda trainable, step: gamma, before=normalised)
    return train(
        seed, loss_fn, params, private,
        settings=recipe.descent._replace(l2_clip_norm=1.0), epsilon=epsilon, delta=delta,
        hooks=hooks, summary=averaged(recipe.decay),
    )  # fmt: skip


def normalised(gradient: Any, gamma: jax.Array | float) -> Any:
    """g / (|g| + gamma)."""
    finite = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0), gradient)
    norm = optax.tree.norm(finite)
    return jax.tree.map(lambda g: g / (norm + gamma), finite)


def averaged(decay: float) -> Callable[[Iterator[Any]], Any]:
    """Exponential moving average of iterates; the first weigh less, as in De et al.'s code."""

    def summary(iterates: Iterator[Any]) -> Any:
        mean = next(iterates)
        for step, iterate in enumerate(iterates, start=1):
            weight = min(decay, (1 + step) / (10 + step))
            mean = _mixed(mean, iterate, weight)
        return mean

    return summary


@jax.jit
def _mixed(old: Any, new: Any, weight: jax.Array | float) -> Any:
    return jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, old, new)
