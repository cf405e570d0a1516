"""What every method of the benchmark shares: where it runs, what it returns, and what is known of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.benchmark.search import Point
from experiments.benchmark.tasks import Pretrained
from experiments.data.splits import Records

Hyperparameters = dict[str, Any]


class Setting(NamedTuple):
    """Where a method runs: task, model, n and epsilon, with the private records of one seed.

    Attributes:
      pretrained: task and model, where all methods start.
      private: a seed's subsample of n records.
      epsilon: infinite for methods that protect nothing.
      delta: of the budget.
    """

    pretrained: Pretrained
    private: Records
    epsilon: float
    delta: float

    @property
    def num_private(self) -> int:
        """N."""
        return len(self.private["label"])


class Outcome(NamedTuple):
    """What a run gives and what it spent.

    Attributes:
      params: the fine-tuned parameters.
      private_gradients: evaluations of a private record's gradient; expected ones, under sampling.
      noisy_steps: noisy releases.
    """

    params: Any
    private_gradients: int
    noisy_steps: int


class Method(NamedTuple):
    """A method under comparison, with the lattice of its hyperparameters.

    Attributes:
      run: `(setting, seed, hyperparameters) -> Outcome`.
      models: those it applies to.
      private: whether epsilon matters.
      hyperparameters: lattice point -> hyperparameters, JSON-able.
      starts: number of private records -> points from which its search starts; empty where nothing is chosen.
      allowed: `(setting, hyperparameters) -> bool`.
      rehearsed: whether hyperparameters are chosen on public records, in place of the test set.
    """

    run: Callable[[Setting, int, Hyperparameters], Outcome]
    models: tuple[str, ...] = ("linear", "mlp", "cnn", "gru")
    private: bool = True
    hyperparameters: Callable[[Point], Hyperparameters] = lambda point: {}
    starts: Callable[[int], list[Point]] = lambda num_private: []
    allowed: Callable[[Setting, Hyperparameters], bool] = lambda setting, hyperparameters: True
    rehearsed: bool = False
