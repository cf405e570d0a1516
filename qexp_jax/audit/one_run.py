"""What one release proves of its privacy, with many canaries in place of many draws.

`one_run_epsilon` audits one release, half of whose canaries were left out (Steinke, Nasr and Jagielski,
arXiv:2305.08846; Mahloujifar, Melis and Chaudhuri, arXiv:2410.22235), through jax_privacy.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import arguments


def make_canaries(key: jax.Array, num_canaries: int, dim: int, l2_clip_norm: float) -> jax.Array:
    """Whitened gradients on the clip boundary: orthogonal up to `dim` of them, random beyond.

    Args:
      key: typed.
      num_canaries: m.
      dim: k.
      l2_clip_norm: C, the length of each.

    Returns:
      (m, k).
    """
    num_canaries = arguments.count("num_canaries", num_canaries)
    dim = arguments.count("dim", dim)
    l2_clip_norm = arguments.positive("l2_clip_norm", l2_clip_norm)
    if num_canaries > dim:
        vectors = jax.random.normal(key, (num_canaries, dim))
        return l2_clip_norm * vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    # The axes, reflected at a random plane: exactly orthogonal, without a factorisation.
    normal = jax.random.normal(key, (dim,))
    normal /= jnp.linalg.norm(normal)
    return l2_clip_norm * (jnp.eye(num_canaries, dim) - 2 * normal[:num_canaries, None] * normal)


def one_run_epsilon(
    key: jax.Array,
    mechanism: Callable[[jax.Array, jax.Array], jax.Array],
    canaries: jax.Array,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    guessed: float = 0.1,
) -> float:
    """Lower bound on epsilon from one release, half of whose canaries were left out by coin flips.

    Args:
      key: typed.
      mechanism: `(key, included) -> noisy sum (k,)`, run once; `included` (m,) bool says which canaries take part. From
        a draw w the noisy sum is -N R^T w.
      canaries: (m, k), what each adds to the whitened sum; a canary's score is its inner product with the noisy sum.
      delta: in (0, 1).
      confidence: in (0, 1), of the bound, given that the true trade-off curve is Gaussian.
      guessed: in (0, 1), share of canaries, those of highest score, that are guessed to be in.

    Raises:
      ImportError: without jax_privacy.
      ValueError: for a share outside (0, 1), and for fewer guesses than could ever refute anything.
    """
    delta = arguments.proportion("delta", delta)
    confidence = arguments.proportion("confidence", confidence)
    guessed = arguments.proportion("guessed", guessed)
    try:
        from jax_privacy import auditing
    except ImportError as error:
        raise ImportError("one_run_epsilon needs jax_privacy: pip install 'jax_privacy>=2.0,<3'.") from error
    _check_guesses(canaries, confidence, guessed)
    coin_key, noise_key = jax.random.split(key)
    included = jax.random.bernoulli(coin_key, 0.5, (len(canaries),))
    noisy_sum = mechanism(noise_key, included)
    scores = np.asarray(jnp.matmul(canaries, noisy_sum, precision="highest"), np.float64)
    # A single NaN would make the quantile NaN.
    scores = np.where(np.isfinite(scores), scores, 0)
    is_in = np.asarray(included)
    auditor = auditing.CanaryScoreAuditor(scores[is_in], scores[~is_in])
    # A quantile of all scores, which no coin has entered, so that nothing is lost to choosing it.
    threshold = auditing.Explicit(float(np.quantile(scores, 1 - guessed)))
    return float(auditor.epsilon_one_run_fdp(1 - confidence, delta, threshold_strategy=threshold))


def _check_guesses(canaries: jax.Array, confidence: float, guessed: float) -> None:
    """Coins alone make all of r guesses right with probability 2^-r: a bound above 0 takes more than that rules out."""
    if np.ndim(canaries) != 2:
        raise ValueError(f"Expected canaries of shape (m, k), found {np.shape(canaries)}.")
    number = len(canaries)
    found = number - math.ceil((1 - guessed) * (number - 1) - 1e-9)  # not below the quantile
    least = math.floor(-math.log2(1 - confidence)) + 1
    if found < least:
        raise ValueError(
            f"Expected at least {least} canaries guessed to be in at {confidence=}, found {found} of {number} at "
            f"{guessed=}."
        )
