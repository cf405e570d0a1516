"""The models and records of the benchmarks: numbers at random, since no time depends on them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.benchmark import models
from qexp_jax.data.records import Params, Record


class Case(NamedTuple):
    """A model with records.

    Attributes:
      name: of the model.
      model_fn: `(params, record) -> logits` of one record.
      params: the pretrained ones.
      records: n records `{"x", "label"}`.
      where: regular expression of the leaves that are tuned.
    """

    name: str
    model_fn: Callable[[Params, Record], jax.Array]
    params: Params
    records: Record
    where: str | None = None

    def loss_fn(self, params: Params, record: Record) -> jax.Array:
        """The loss of one record."""
        return output_loss(self.model_fn(params, record), record)


def output_loss(logits: jax.Array, record: Record) -> jax.Array:
    """Cross entropy of one record's logits."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, record["label"])


class Dense(nn.Module):
    """y = x W + x A B: a frozen matrix and its low-rank update (Hu et al., arXiv:2106.09685)."""

    features: int
    rank: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., width) -> (..., features)."""
        down = self.param("lora_a", nn.initializers.normal(0.02), (x.shape[-1], self.rank))
        up = self.param("lora_b", nn.initializers.normal(0.02), (self.rank, self.features))
        return nn.Dense(self.features, use_bias=False)(x) + (x @ down) @ up


class Transformer(nn.Module):
    """A pre-norm encoder of byte tokens with a two-way head; queries and values have low-rank updates."""

    layers: int = 2
    width: int = 128
    heads: int = 4
    rank: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (2,) of one sequence (length,)."""
        x = nn.Embed(256, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape)
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            x = x + nn.Dense(self.width, use_bias=False)(self.attend(y))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(2, name="head")(jnp.mean(x, axis=0))

    def attend(self, x: jax.Array) -> jax.Array:
        """Self-attention, (length, width) -> (length, width)."""
        split = lambda y: y.reshape(len(x), self.heads, -1)
        q = split(Dense(self.width, self.rank)(x))
        v = split(Dense(self.width, self.rank)(x))
        k = split(nn.Dense(self.width, use_bias=False)(x))
        weights = jax.nn.softmax(jnp.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5)
        return jnp.einsum("hij,jhd->ihd", weights, v).reshape(x.shape)


class SmallMLP(nn.Module):
    """One hidden layer of 48: d = 9,946 on 14 x 14 images, where a dense Hessian still fits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (10,) of one image."""
        return nn.Dense(10)(nn.relu(nn.Dense(48)(x.ravel())))


def images(name: str, module: nn.Module, num_records: int, side: int = 28) -> Case:
    """An image classifier of ten classes.

    Args:
      name: of the case.
      module: the model.
      num_records: n.
      side: of an image, in pixels.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (num_records, side, side))
    labels = jax.random.randint(keys[1], (num_records,), 0, 10)
    return _case(name, module, keys[2], {"x": x, "label": labels})


def transformer(num_records: int, length: int) -> Case:
    """The transformer, of which the low-rank updates alone are tuned."""
    keys = jax.random.split(jax.random.key(1), 3)
    tokens = jax.random.randint(keys[0], (num_records, length), 0, 256)
    labels = jax.random.randint(keys[1], (num_records,), 0, 2)
    return _case("transformer-LoRA", Transformer(), keys[2], {"x": tokens, "label": labels}, where="lora")


def _case(name: str, module: nn.Module, key: jax.Array, records: Record, where: str | None = None) -> Case:
    """A case with random parameters."""
    params: Any = module.init(key, records["x"][0])
    return Case(name, lambda p, record: module.apply(p, record["x"]), params, records, where)


def linear(num_records: int) -> Case:
    """Logistic regression on 28 x 28 images."""
    return images("linear", models.Linear(10), num_records)


def cnn(num_records: int) -> Case:
    """The small CNN of the benchmark."""
    return images("cnn", models.SmallCNN(10), num_records)


def mlp(num_records: int) -> Case:
    """The MLP of d = 9,946."""
    return images("mlp", SmallMLP(), num_records, side=14)
