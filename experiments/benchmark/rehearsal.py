"""What a user can do to find a baseline's hyperparameters: rehearse on public records, at no cost in privacy.

A third of the public records plays the private part, two thirds of which are fine-tuned on and the rest scored; the
model is pretrained on the public records that are left. In every second rehearsal the third is a population of its own,
a cluster of writers or of records, so that hyperparameters are also chosen for a shift.
"""

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from experiments.benchmark import models
from experiments.benchmark.tasks import Pretrained
from experiments.data.splits import Records, select

NUM_REHEARSALS = 4
_PARTS = 3  # as many clusters, of which one is held out; as large a share is where parts are alike
_AXES = 10  # distances in more are much the same
_SCORED = 1 / 3  # of a part


def rehearsals(pretrained: Pretrained, model_name: str, metric: str = "negative_loss") -> list[Pretrained]:
    """The task in miniature, `NUM_REHEARSALS` times: public records in all three parts of its split.

    Args:
      pretrained: the task itself, of which only the public records are looked at.
      model_name: key of `models.MODELS`.
      metric: key of `models.METRICS`, by which hyperparameters are chosen.
    """
    public = pretrained.split.public
    parts = [*_alike(public, NUM_REHEARSALS // 2), *_shifted(public, NUM_REHEARSALS // 2)]
    return [_rehearsal(pretrained, model_name, metric, part, seed) for seed, part in enumerate(parts)]


def subsample(rehearsal: Pretrained, n: int, seed: int) -> Records:
    """n records of the part that plays the private one, drawn again and again where it has fewer."""
    count = len(rehearsal.split.private["label"])
    return select(rehearsal.split.private, np.random.default_rng([seed, n]).choice(count, n, replace=n > count))


def _rehearsal(pretrained: Pretrained, model_name: str, metric: str, part: np.ndarray, seed: int) -> Pretrained:
    """One of them.

    Args:
      pretrained: the task itself.
      model_name: key of `models.MODELS`.
      metric: key of `models.METRICS`.
      part: (n,) bool, which public records play the private and the test part.
      seed: of the split and of pretraining.
    """
    public = pretrained.split.public
    order = np.random.default_rng(seed).permutation(np.flatnonzero(part))
    scored = int(_SCORED * len(order))
    split = pretrained.split._replace(
        public=select(public, np.flatnonzero(~part)),
        private=select(public, order[scored:]),
        test=select(public, order[:scored]),
    )
    task = pretrained.task
    params = models.pretrain(pretrained.model, split.public, seed=seed, **task.pretraining[model_name])
    return pretrained._replace(task=task._replace(metric=metric), split=split, params=params)


def _alike(public: Records, number: int) -> list[np.ndarray]:
    """Thirds of the public records at random."""
    count = len(public["label"])
    return [np.random.default_rng(seed).permutation(count) < count // _PARTS for seed in range(number)]


def _shifted(public: Records, number: int) -> list[np.ndarray]:
    """The largest clusters, of writers where records name theirs."""
    rows = public["x"].reshape(len(public["label"]), -1)
    if "writer" not in public:
        return _largest(_clusters(rows), number)
    writers, index = np.unique(public["writer"], return_inverse=True)
    return _largest(_clusters(_means(rows, index, len(writers)))[index], number)


def _means(rows: np.ndarray, index: np.ndarray, num_groups: int) -> np.ndarray:
    """The mean row of each group."""
    sums = np.zeros((num_groups, rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums / np.bincount(index, minlength=num_groups)[:, None]


def _clusters(rows: np.ndarray) -> np.ndarray:
    """The cluster of each row."""
    axes = min(_AXES, *rows.shape)
    return KMeans(_PARTS, n_init=3, random_state=0).fit_predict(PCA(axes, random_state=0).fit_transform(rows))


def _largest(clusters: np.ndarray, number: int) -> list[np.ndarray]:
    """Which records are in each of the largest clusters."""
    names, counts = np.unique(clusters, return_counts=True)
    return [clusters == name for name in names[np.argsort(-counts)][:number]]
