"""The baselines' hyperparameters: from points of a lattice to numbers, where searches start, and what is allowed.

A lattice is logarithmic and has no edges but those that an `..._allowed` states: cost (at most 64 passes over the
private records) and what a guarantee requires.
"""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.baselines import linear
from experiments.benchmark.search import Point
from experiments.benchmark.setting import Hyperparameters, Setting

MAX_PASSES = 64
MAX_STEPS = 405
MIN_BATCH = 16


class _DescentAxes(NamedTuple):
    """Neighbours differ by factors of 4 in the sampling probability, 3 in steps, 2 in length, 10^(1/2) in clip norm."""

    sampling: int
    steps: int
    length: int
    clip: int


def descent(point: Point) -> Hyperparameters:
    """Hyperparameters of DP-SGD and its relatives at `(sampling, steps, length, clip)`."""
    at = _DescentAxes(*point)
    return {
        "sampling_prob": 4.0**at.sampling,
        "steps": round(5 * 3.0**at.steps),
        "length": 2.0**at.length,
        "l2_clip_norm": 10.0 ** (at.clip / 2),
    }


def full_batch(point: Point) -> Hyperparameters:
    """Those of `descent` with every record in every step, at `(steps, length, clip)`."""
    return descent((0, *point))


def descent_allowed(setting: Setting, hyperparameters: Hyperparameters) -> bool:
    """Whether a batch is large enough, and steps and passes over the private records few enough."""
    sampling_prob = hyperparameters["sampling_prob"]
    steps = hyperparameters["steps"]
    batch = sampling_prob * setting.num_private
    return sampling_prob <= 1 and batch >= MIN_BATCH and 1 < steps <= MAX_STEPS and steps * sampling_prob <= MAX_PASSES


def descent_starts(lengths: Sequence[int], num_private: int) -> list[Point]:
    """45 steps at each of `lengths`; the fewer the records, the larger the share in a batch."""
    if num_private >= 1000:
        sampling = -2
    elif num_private >= 4 * MIN_BATCH:
        sampling = -1
    else:
        sampling = 0
    return [(sampling, 2, length, 0) for length in lengths]


def full_batch_starts(num_private: int) -> list[Point]:
    """15 steps of several lengths."""
    return [(1, length, 0) for length in (-1, 1, 3, 5)]


def perturbation(point: Point) -> Hyperparameters:
    """Hyperparameters of objective perturbation at `(radius, strength)`.

    Regularisation is in units of the squared norm bound, so that both axes stay apart.
    """
    radius, strength = point
    norm_bound = 10.0 ** (radius / 2)
    return {"norm_bound": norm_bound, "regularisation": 2.0**strength * norm_bound**2}


def perturbation_allowed(setting: Setting, hyperparameters: Hyperparameters) -> bool:
    """Whether the change of the determinant leaves a tenth of epsilon to the noise."""
    outputs = setting.pretrained.task.num_outputs
    return linear.determinant_share(outputs, **hyperparameters) < 0.9 * setting.epsilon


def perturbation_starts(num_private: int) -> list[Point]:
    """A norm bound of 10 and several strengths: the least that is allowed depends on epsilon."""
    return [(2, strength) for strength in (0, 2, 4, 6, 8, 10)]


def adassp(point: Point) -> Hyperparameters:
    """Hyperparameters of AdaSSP at `(radius, step)`."""
    radius, step = point
    return {"norm_bound": 10.0 ** (radius / 2), "step": 2.0**step}


def learning_rate(point: Point) -> Hyperparameters:
    """That of training without privacy."""
    (exponent,) = point
    return {"learning_rate": 10.0 ** (exponent / 2)}
