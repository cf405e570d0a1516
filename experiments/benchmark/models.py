"""The Flax models of the experiments: loss of one record, training without privacy, test metrics."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from experiments.data.splits import Records, select


class Linear(nn.Module):
    """Logistic regression."""

    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (num_outputs,) of one record."""
        return nn.Dense(self.num_outputs, name="head")(x.ravel())


class MLP(nn.Module):
    """One hidden layer of 32: about 25,000 parameters on 28 x 28 images."""

    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (num_outputs,) of one record."""
        return nn.Dense(self.num_outputs, name="head")(nn.relu(nn.Dense(32)(x.ravel())))


class SmallCNN(nn.Module):
    """Two strided convolutions and two dense layers: about 30,000 parameters on 28 x 28 images."""

    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (num_outputs,) of one image (28, 28)."""
        x = nn.relu(nn.Conv(16, (5, 5), strides=2)(x[..., None]))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(16)(x.ravel()))
        return nn.Dense(self.num_outputs, name="head")(x)


class GRU(nn.Module):
    """A recurrent network with a state of 32, read after the last hour: about 13,000 parameters on 104 variables."""

    num_outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (num_outputs,) of one series (hours, variables)."""
        states = nn.RNN(nn.GRUCell(32))(x)
        return nn.Dense(self.num_outputs, name="head")(states[-1])


MODELS = {"linear": Linear, "mlp": MLP, "cnn": SmallCNN, "gru": GRU}


class Model(NamedTuple):
    """A Flax module, the loss of one record, and the logits of a batch (jitted)."""

    module: nn.Module
    loss_fn: Callable[[Any, Any], jax.Array]
    logits: Callable[[Any, Any], jax.Array]


@functools.lru_cache
def make_model(name: str, num_outputs: int) -> Model:
    """The model `name`; one output is one logit of a binary outcome. Cached, so that equal models compile once."""
    module = MODELS[name](num_outputs)

    def loss_fn(params: Any, record: Any) -> jax.Array:
        return cross_entropy(module.apply(params, record["x"]), record["label"])

    return Model(module, loss_fn, jax.jit(jax.vmap(module.apply, in_axes=(None, 0))))


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """In nats, of logits (..., outputs); one output is the logit of a binary label."""
    if logits.shape[-1] == 1:
        return optax.sigmoid_binary_cross_entropy(logits[..., 0], label)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def init(model: Model, key: jax.Array, records: Records) -> Any:
    """Parameters before training."""
    return model.module.init(key, jnp.asarray(records["x"][0]))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of records whose label has the largest logit."""
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of one logit; .5 where a logit is not finite."""
    scores = logits[:, 0]
    return float(roc_auc_score(labels, scores)) if np.all(np.isfinite(scores)) else 0.5


def negative_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Less the mean cross-entropy, in nats; minus infinity where it is not finite."""
    loss = float(jnp.mean(cross_entropy(jnp.asarray(logits), jnp.asarray(labels))))
    return -loss if np.isfinite(loss) else -np.inf


METRICS = {"accuracy": accuracy, "auroc": auroc, "negative_loss": negative_loss}


def evaluate(model: Model, params: Any, records: Records, metric: str) -> float:
    """One metric.

    Args:
      model: whose logits are scored.
      params: its parameters.
      records: (n, ...) labelled records.
      metric: key of `METRICS`.
    """
    return scores(model, params, records, [metric])[0]


def scores(model: Model, params: Any, records: Records, metrics: Sequence[str]) -> list[float]:
    """Several metrics from the same logits.

    Args:
      model: whose logits are scored.
      params: its parameters.
      records: (n, ...) labelled records.
      metrics: keys of `METRICS`.
    """
    logits = np.asarray(model.logits(params, records["x"]))
    return [METRICS[metric](logits, records["label"]) for metric in metrics]


@functools.partial(jax.jit, static_argnames=("loss_fn", "optimizer"))
def _step(
    params: Any,
    state: Any,
    records: Records,
    index: jax.Array,
    loss_fn: Callable[[Any, Any], jax.Array],
    optimizer: optax.GradientTransformation,
) -> tuple[Any, Any]:
    """Parameters and optimizer's state after one step on the records at `index`."""
    batch = jax.tree.map(lambda x: x[index], records)

    def mean_loss(params: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, batch))

    updates, state = optimizer.update(jax.grad(mean_loss)(params), state, params)
    return optax.apply_updates(params, updates), state


@functools.lru_cache
def _adamw(learning_rate: float, steps: int, weight_decay: float) -> optax.GradientTransformation:
    # Cached: an optimizer is a static argument of `_step`, and a new one would compile it again.
    return optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay)


def epochs_of_adamw(
    loss_fn: Callable,
    params: Any,
    records: Records,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    weight_decay: float = 1e-3,
    name: str | None = None,
) -> Iterator[Any]:
    """Parameters after each epoch of AdamW with a cosine schedule, without privacy.

    Args:
      loss_fn: of one record.
      params: before the first step.
      records: (n, ...) training records.
      epochs: passes over the records; a last batch that is not full is left out.
      learning_rate: at the first step.
      batch_size: at most n.
      seed: of the order of the records.
      weight_decay: of AdamW.
      name: of the progress bar; none without it.
    """
    count = len(records["label"])
    batch_size = min(batch_size, count)
    steps = count // batch_size
    optimizer = _adamw(learning_rate, epochs * steps, weight_decay)
    state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    on_device = jax.tree.map(jnp.asarray, records)
    for _ in tqdm(range(epochs), desc=name, unit="epoch", disable=name is None):
        for index in rng.permutation(count)[: steps * batch_size].reshape(steps, batch_size):
            params, state = _step(params, state, on_device, index, loss_fn, optimizer)
        yield jax.block_until_ready(params)


def train(model: Model, params: Any, records: Records, **hyperparameters: Any) -> Any:
    """The parameters after the last epoch.

    Args:
      model: whose loss is minimised.
      params: before the first step.
      records: (n, ...) training records.
      **hyperparameters: of `epochs_of_adamw`.
    """
    *_, last = epochs_of_adamw(model.loss_fn, params, records, **hyperparameters)
    return last


def pretrain(model: Model, records: Records, *, seed: int, held_out: float = 0.1, **hyperparameters: Any) -> Any:
    """The epoch of least loss on held-out public records.

    Args:
      model: trained from its initial parameters.
      records: (n, ...) public records.
      seed: of initial parameters, held-out records and order.
      held_out: share of the records.
      **hyperparameters: of `epochs_of_adamw`.
    """
    order = np.random.default_rng(seed).permutation(len(records["label"]))
    cut = int(held_out * len(order))
    validation = select(records, order[:cut])
    training = select(records, order[cut:])
    mean_loss = jax.jit(lambda params: jnp.mean(jax.vmap(model.loss_fn, in_axes=(None, 0))(params, validation)))
    start = init(model, jax.random.key(seed), records)
    return min(epochs_of_adamw(model.loss_fn, start, training, seed=seed, **hyperparameters), key=mean_loss)
