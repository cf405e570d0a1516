"""A small Flax CNN for 28 x 28 images: model, loss of one record, training without privacy, accuracy."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.data import Records


class SmallCNN(nn.Module):
    """Two strided convolutions and two dense layers, about 30,000 parameters."""

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Logits (10,) of one image (28, 28)."""
        x = image[..., None]
        x = nn.relu(nn.Conv(16, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(16)(x.ravel()))
        return nn.Dense(10)(x)


MODEL = SmallCNN()


def loss_fn(params: Any, record: dict[str, jax.Array]) -> jax.Array:
    """Cross-entropy of one record."""
    return optax.softmax_cross_entropy_with_integer_labels(MODEL.apply(params, record["image"]), record["label"])


def init(key: jax.Array) -> Any:
    """Parameters before training."""
    return MODEL.init(key, jnp.zeros((28, 28)))


@functools.partial(jax.jit, static_argnames="optimizer")
def _step(params, state, batch, optimizer):
    def mean_loss(params):
        return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, batch))

    updates, state = optimizer.update(jax.grad(mean_loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def train(
    params: Any, records: Records, *, epochs: int, learning_rate: float, batch_size: int, seed: int, name: str
) -> Any:
    """AdamW with a cosine schedule, with a progress bar."""
    steps = len(records["label"]) // batch_size
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, epochs * steps), weight_decay=1e-3)
    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        order = rng.permutation(steps * batch_size).reshape(steps, batch_size)
        for index in order:
            batch = {key: values[index] for key, values in records.items()}
            params, state = _step(params, state, batch, optimizer)
        jax.block_until_ready(params)
    return params


_logits: Callable = jax.jit(jax.vmap(MODEL.apply, in_axes=(None, 0)))


def predict(params: Any, records: Records) -> np.ndarray:
    """The most likely label of each record (n,)."""
    return np.asarray(jnp.argmax(_logits(params, records["image"]), axis=1))


def accuracy(params: Any, records: Records) -> float:
    """Share of records whose label is predicted."""
    return float(np.mean(predict(params, records) == records["label"]))
