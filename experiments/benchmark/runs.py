"""One method in one setting: its hyperparameters are chosen, then every seed is run, measured and scored."""

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmark import models, rehearsal
from experiments.benchmark.measure import measured
from experiments.benchmark.methods import METHODS
from experiments.benchmark.results import Group, point_of
from experiments.benchmark.search import Point, climb
from experiments.benchmark.setting import Hyperparameters, Method, Setting
from experiments.benchmark.tasks import Pretrained
from experiments.data.splits import Records, select

SELECTION_SEEDS = 2


def subsample(pretrained: Pretrained, n: int, seed: int) -> Records:
    """The private records of a seed, the same for every method."""
    private = pretrained.split.private
    order = np.random.default_rng([seed, n]).permutation(len(private["label"]))
    return select(private, order[:n])


def reordered(setting: Setting, seed: int) -> Setting:
    """The public records in an order of the seed's own, so that standard errors know of what a plan samples."""
    split = setting.pretrained.split
    order = np.random.default_rng([seed, 1]).permutation(len(split.public["label"]))
    in_order = split._replace(public=select(split.public, order))
    return setting._replace(pretrained=setting.pretrained._replace(split=in_order))


def metric_of(setting: Setting, params: Any) -> float:
    """The task's test metric."""
    pretrained = setting.pretrained
    return models.evaluate(pretrained.model, params, pretrained.split.test, pretrained.task.metric)


def choose(method: Method, settings: list[Setting], near: list[Point]) -> Point:
    """The lattice point of best mean test metric; () where nothing is chosen.

    Args:
      method: with its lattice.
      settings: one for each seed from 0 on, or for each rehearsal.
      near: points to start at, as far as they are allowed; else where the method's searches start.
    """

    def score(point: Point) -> float:
        hyperparameters = method.hyperparameters(point)
        outcomes = (method.run(setting, seed, hyperparameters) for seed, setting in enumerate(settings))
        metrics = [metric_of(setting, outcome.params) for setting, outcome in zip(settings, outcomes, strict=True)]
        return float(np.mean(metrics))

    def allowed(point: Point) -> bool:
        return method.allowed(settings[0], method.hyperparameters(point))

    starts = [point for point in near if allowed(point)] or method.starts(settings[0].num_private)
    return climb(score, starts, allowed) if starts else ()


def rehearsal_settings(rehearsals: list[Pretrained], group: Group, delta: float) -> list[Setting]:
    """A group's setting, once in each rehearsal, with public records in the private ones' place."""
    return [
        Setting(pretrained, rehearsal.subsample(pretrained, group.n, seed), group.epsilon, delta)
        for seed, pretrained in enumerate(rehearsals)
    ]


def group_rows(
    pretrained: Pretrained,
    group: Group,
    *,
    delta: float,
    first_seed: int,
    num_seeds: int,
    near: list[Point],
    rehearsals: Callable[[], list[Pretrained]],
    before: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """The rows of all seeds of a group.

    Args:
      pretrained: of the group's task and model.
      group: what is run.
      delta: of the budget.
      first_seed: seeds are counted from here; a search sees those from 0 on in any case.
      num_seeds: how many.
      near: points where the search for hyperparameters may start.
      rehearsals: of `rehearsal`, made where a method needs them.
      before: a row of the group from an earlier run, whose hyperparameters are taken in place of a search.
    """
    method = METHODS[group.method]

    def setting_of(seed: int) -> Setting:
        return Setting(pretrained, subsample(pretrained, group.n, seed), group.epsilon, delta)

    if before is None:
        if method.rehearsed:
            settings = rehearsal_settings(rehearsals(), group, delta)
        else:
            settings = [setting_of(seed) for seed in range(min(SELECTION_SEEDS, num_seeds))]
        start = time.perf_counter()
        point = choose(method, settings, near)
        search_seconds = f"{time.perf_counter() - start:.2f}"
        hyperparameters = method.hyperparameters(point)
    else:
        point = point_of(before)
        hyperparameters = json.loads(before["settings"])
        # What it took to choose them, then.
        search_seconds = before["search_seconds"]
    chosen = {
        "settings": json.dumps(hyperparameters),
        "lattice_point": " ".join(map(str, point)),
        "search_seconds": search_seconds,
    }
    return [
        _row(setting_of(seed), group, seed, hyperparameters) | chosen
        for seed in range(first_seed, first_seed + num_seeds)
    ]


def _row(setting: Setting, group: Group, seed: int, hyperparameters: Hyperparameters) -> dict[str, Any]:
    """One run: its labels, its scores and its cost."""
    prepared = reordered(setting, seed)
    with measured() as cost:
        outcome = METHODS[group.method].run(prepared, seed, hyperparameters)
    pretrained = setting.pretrained
    metrics = (pretrained.task.metric, "negative_loss")
    metric, negative_loss = models.scores(pretrained.model, outcome.params, pretrained.split.test, metrics)
    return {
        "table": pretrained.task.table,
        "task": pretrained.task.name,
        "pretraining": f"{pretrained.task.pretraining[group.model]['epochs']} epochs",
        "model": group.model,
        "n": setting.num_private,
        "epsilon": setting.epsilon,
        "delta": setting.delta,
        "method": group.method,
        "seed": seed,
        "metric_name": pretrained.task.metric,
        "metric": round(metric, 6),
        "loss": round(-negative_loss, 6),
        "seconds": round(cost.seconds, 4),
        "compile_seconds": round(cost.compile_seconds, 4),
        "private_gradients": outcome.private_gradients,
        "noisy_steps": outcome.noisy_steps,
        "peak_bytes": cost.peak_bytes,
    }
