"""The benchmark's tasks: split, metric, models, and how each model is pretrained on the public part."""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.benchmark import models
from experiments.data import mimic, mimic_published, mnist, physionet, small
from experiments.data.splits import Split


class Task(NamedTuple):
    """A public -> private task.

    Attributes:
      table: of the results, to which the task belongs.
      name: as there.
      metric: key of `models.METRICS`.
      num_outputs: logits of a model.
      pretraining: hyperparameters of `models.pretrain` for each model.
      load: `(data_dir, cache_dir) -> Split`.
    """

    table: str
    name: str
    metric: str
    num_outputs: int
    pretraining: dict[str, dict[str, Any]]
    load: Callable[[pathlib.Path, pathlib.Path], Split]


_CLINICAL = {
    "linear": {"epochs": 20, "learning_rate": 3e-3, "batch_size": 64},
    "mlp": {"epochs": 10, "learning_rate": 1e-3, "batch_size": 64},
}
_HOURLY = {
    "linear": {"epochs": 20, "learning_rate": 3e-3, "batch_size": 64},
    "gru": {"epochs": 10, "learning_rate": 1e-3, "batch_size": 64},
}
# Until the loss on a held-out tenth of the public part stops falling.
_IMAGES = {
    "linear": {"epochs": 20, "learning_rate": 3e-3, "batch_size": 64},
    "mlp": {"epochs": 20, "learning_rate": 3e-3, "batch_size": 64},
    "cnn": {"epochs": 8, "learning_rate": 2e-3, "batch_size": 64},
}
# Less, as is common in demonstrations: what private records teach is in part what more public epochs would.
_IMAGES_BRIEFLY = {
    "linear": {"epochs": 5, "learning_rate": 1e-3, "batch_size": 64},
    "mlp": {"epochs": 5, "learning_rate": 1e-3, "batch_size": 64},
    "cnn": {"epochs": 3, "learning_rate": 1e-3, "batch_size": 64},
}
# Until little loss is left on small public parts.
_FITTED = {
    "linear": {"epochs": 60, "learning_rate": 3e-3, "batch_size": 64},
    "mlp": {"epochs": 60, "learning_rate": 3e-3, "batch_size": 64},
}


def _mimic(outcome: str, split_by: str) -> Task:
    def load(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Split:
        return mimic.load(data_dir, outcome=outcome, split_by=split_by, cache_dir=cache_dir)

    return Task("mimic", f"mimic_{outcome}_by_{split_by}", "auroc", 1, _CLINICAL, load)


def _published(outcome: str) -> Task:
    def load(data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Split:
        return mimic_published.load(data_dir, outcome=outcome, cache_dir=cache_dir)

    return Task("mimic", f"mimic_{outcome}_published", "auroc", 1, _HOURLY, load)


OPEN_TASKS = {
    task.name: task
    for task in (
        Task("main", "physionet_icu", "auroc", 1, _CLINICAL, physionet.by_icu),
        Task("main", "physionet_control", "auroc", 1, _CLINICAL, physionet.no_shift),
        Task(
            "main", "mnist_trained", "accuracy", 10, _IMAGES, lambda data_dir, cache_dir: mnist.writers_mnist(data_dir)
        ),
    )
}
# For users with credentials: --data-dir names the directory of MIMIC-III or MIMIC-IV.
MIMIC_TASKS = {
    task.name: task
    for task in (
        _mimic(outcome, split_by) for outcome in ("mortality", "long_stay") for split_by in ("care_unit", "era")
    )
} | {task.name: task for task in map(_published, ("mortality", "long_stay"))}
# Not in the grid: a model that was trained briefly, and a shift so heavy that public curvature says little.
OTHER_IMAGES = {
    task.name: task
    for task in (
        Task(
            "other",
            "mnist_writers",
            "accuracy",
            10,
            _IMAGES_BRIEFLY,
            lambda data_dir, cache_dir: mnist.writers_mnist(data_dir),
        ),
        Task(
            "other",
            "mnist_rotated",
            "accuracy",
            10,
            _IMAGES_BRIEFLY,
            lambda data_dir, cache_dir: mnist.rotated_mnist(data_dir),
        ),
    )
}


def _small(
    name: str,
    metric: str,
    num_outputs: int,
    pretraining: dict[str, dict[str, Any]],
    load: Callable[[str, pathlib.Path, pathlib.Path], Split],
    kinds: Sequence[str],
) -> dict[str, Task]:
    """The tasks of one family of `small`, one for each kind of change."""
    return {
        f"{name}_{kind}": Task(
            "small", f"{name}_{kind}", metric, num_outputs, pretraining, functools.partial(load, kind)
        )
        for kind in kinds
    }


SMALL_TASKS = (
    _small("physionet", "auroc", 1, _CLINICAL, small.changed_physionet, ("moved", "flipped", "inverted"))
    | _small("digits", "accuracy", 10, _FITTED, small.changed_digits, ("noisy", "turned", "transposed"))
    | _small("table", "auroc", 1, _FITTED, small.changed_table, ("changed", "inverted"))
    | {
        task.name: task
        for task in (
            Task("small", "table_rare", "auroc", 1, _CLINICAL, small.rare_table),
            Task("small", "physionet_rare", "auroc", 1, _CLINICAL, small.rare_physionet),
        )
    }
)
TASKS = OPEN_TASKS | MIMIC_TASKS | OTHER_IMAGES | SMALL_TASKS


class Pretrained(NamedTuple):
    """A task with a pretrained model: what every method starts from.

    Attributes:
      task: what is to be learnt.
      split: its records.
      model: the architecture and its loss.
      params: pretrained on `split.public`.
    """

    task: Task
    split: Split
    model: models.Model
    params: Any


@functools.lru_cache(maxsize=4)
def load_split(name: str, data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Split:
    """The task's split, kept in memory."""
    return TASKS[name].load(data_dir, cache_dir)


def pretrained_on(task: Task, model_name: str, data_dir: pathlib.Path, cache_dir: pathlib.Path) -> Pretrained:
    """A model pretrained on the task's public part; deterministic.

    Args:
      task: with hyperparameters of pretraining for this model.
      model_name: key of `models.MODELS`.
      data_dir: folder with what the publishers distribute.
      cache_dir: folder for derived tables.
    """
    split = load_split(task.name, data_dir, cache_dir)
    model = models.make_model(model_name, task.num_outputs)
    params = models.pretrain(model, split.public, seed=0, **task.pretraining[model_name])
    return Pretrained(task, split, model, params)


def data_dir() -> pathlib.Path:
    """$QEXP_DATA, or the user's cache."""
    return pathlib.Path(os.environ.get("QEXP_DATA", pathlib.Path.home() / ".cache" / "qexp_jax" / "data"))


def cache_dir() -> pathlib.Path:
    """$QEXP_CACHE, or the user's cache."""
    return pathlib.Path(os.environ.get("QEXP_CACHE", pathlib.Path.home() / ".cache" / "qexp_jax" / "tables"))
