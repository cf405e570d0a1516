"""Methods that anybody could run who has public records too: recipes, public curvature and gradients, rehearsals.

recipe_...      published settings, nothing is chosen
public_...      DP-SGD that sees public records: as curvature, as gradients, or to train on those that fit
rehearsed_...   any other baseline, its hyperparameters chosen on public records alone (`rehearsal`)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.baselines import preconditioning, public_gradients, recipes, selection
from experiments.baselines.dp_sgd import Settings
from experiments.benchmark import lattices, models
from experiments.benchmark.search import Point
from experiments.benchmark.setting import Hyperparameters, Method, Outcome, Setting
from experiments.benchmark.tasks import Pretrained

REHEARSED = "rehearsed_"


class _Published(NamedTuple):
    """A published relative of DP-SGD that sees public records.

    Attributes:
      train: of `baselines`.
      settings: of `train`, from DP-SGD's settings and its own hyperparameters.
      axes: name -> exponent -> value, of its own hyperparameters.
      starts: exponents of these where searches start.
      steps_before: noisy steps on all private records before DP-SGD's.
      options: `(pretrained, seed) -> options` of `train` beside those that all share.
    """

    train: Callable[..., Any]
    settings: Callable[..., Any]
    axes: dict[str, Callable[[int], float]]
    starts: tuple[Point, ...]
    steps_before: int = 0
    options: Callable[[Pretrained, int], dict[str, Any]] = lambda pretrained, seed: {}


def _train_on_public(pretrained: Pretrained, seed: int) -> dict[str, Any]:
    """How selective pretraining trains on what it selects."""
    epochs = {"epochs": 3, "learning_rate": 1e-3, "batch_size": 64, "seed": seed}
    return {"train_on_public": functools.partial(models.train, pretrained.model, **epochs)}


def _half_decades(exponent: int) -> float:
    return 10.0 ** (exponent / 2)


_PUBLISHED = {
    "public_kfac": _Published(
        preconditioning.public_kfac,
        preconditioning.Preconditioned,
        {"damping": _half_decades},
        ((0,), (-2,)),
    ),
    "public_adadps": _Published(
        preconditioning.adadps,
        preconditioning.Preconditioned,
        {"damping": _half_decades},
        ((0,), (-1,)),
    ),
    "public_mixing": _Published(
        public_gradients.mixed_gradients,
        public_gradients.Mixing,
        {"weight": lambda exponent: 1 - 2.0**-exponent},
        ((1,), (3,)),
    ),
    "public_mirror": _Published(
        public_gradients.mirror_descent,
        public_gradients.Mirror,
        {"horizon": lambda exponent: 2.0**exponent},
        ((0,), (2,)),
    ),
    "public_dope": _Published(
        public_gradients.dope_sgd,
        public_gradients.Centred,
        {},
        ((),),
    ),
    "public_selection": _Published(
        selection.selective_pretraining,
        selection.Selection,
        {"share": lambda exponent: 2.0**-exponent, "fraction": lambda exponent: 4.0**-exponent},
        ((3, 1), (3, 2)),
        steps_before=selection.Selection._field_defaults["classifier_steps"],
        options=_train_on_public,
    ),
}


def _run(published: _Published, setting: Setting, seed: int, hyperparameters: Hyperparameters) -> Outcome:
    own = {name: hyperparameters[name] for name in published.axes}
    descent = Settings(**{name: hyperparameters[name] for name in Settings._fields})
    pretrained = setting.pretrained
    params = published.train(
        seed, pretrained.model.loss_fn, pretrained.params, setting.private, pretrained.split.public,
        settings=published.settings(descent, **own), epsilon=setting.epsilon, delta=setting.delta,
        **published.options(pretrained, seed),
    )  # fmt: skip
    passes = published.steps_before + descent.steps * descent.sampling_prob
    return Outcome(params, round(passes * setting.num_private), published.steps_before + descent.steps)


def _method(published: _Published) -> Method:
    def hyperparameters(point: Point) -> Hyperparameters:
        own = zip(published.axes.items(), point[4:], strict=True)
        return lattices.descent(point[:4]) | {name: value(exponent) for (name, value), exponent in own}

    def starts(num_private: int) -> list[Point]:
        of_descent = lattices.descent_starts((1, 3, 5), num_private)
        return [(*point, *own) for point in of_descent for own in published.starts]

    return Method(functools.partial(_run, published), hyperparameters=hyperparameters, starts=starts, allowed=_allowed)


def _allowed(setting: Setting, hyperparameters: Hyperparameters) -> bool:
    """What DP-SGD may have, and weights and shares within their bounds."""
    within = {
        "weight": lambda x: 0 < x < 1,
        "share": lambda x: 0 < x < 1,
        "fraction": lambda x: 0 < x <= 1,
        "horizon": lambda x: x >= 1,
    }
    own = all(holds(hyperparameters[name]) for name, holds in within.items() if name in hyperparameters)
    return own and lattices.descent_allowed(setting, hyperparameters)


def _recipe(train: Callable[..., Any], setting: Setting, seed: int, hyperparameters: Hyperparameters) -> Outcome:
    recipe = recipes.Recipe()
    pretrained = setting.pretrained
    params = train(
        seed, pretrained.model.loss_fn, pretrained.params, setting.private,
        epsilon=setting.epsilon, delta=setting.delta, recipe=recipe,
    )  # fmt: skip
    passes = recipe.descent.steps * recipe.descent.sampling_prob
    return Outcome(params, round(passes * setting.num_private), recipe.descent.steps)


PUBLIC_METHODS = {
    "recipe_de": Method(functools.partial(_recipe, recipes.published_recipe)),
    "recipe_automatic": Method(functools.partial(_recipe, recipes.automatic_clipping)),
    **{name: _method(published) for name, published in _PUBLISHED.items()},
}


def rehearsed(methods: dict[str, Method]) -> dict[str, Method]:
    """The same methods, those that have something to choose, chosen by rehearsal."""
    return {
        f"{REHEARSED}{name}": method._replace(rehearsed=True)
        for name, method in methods.items()
        if method.private and method.starts(1000)
    }
