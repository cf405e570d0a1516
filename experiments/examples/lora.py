"""A small transformer, of which only the LoRA factors are tuned privately; the pretrained weights are held.

    python -m experiments.examples.lora

It learns to predict the next character of Python code, the public text, and is fine-tuned on passages of the Python
manual, the private one; both come with every Python. Takes about four minutes.
"""

import argparse
import pathlib
import pydoc_data.topics
import sysconfig

import jax
import numpy as np
import optax

import qexp_jax
from experiments.studies.gpt import GPT

LENGTH = 32  # characters that the model reads; a passage has one more, the last to be predicted
MODEL = GPT(vocabulary=128, width=64, layers=2, context=LENGTH, lora_rank=4)


def loss_fn(params, record):  # of ONE record
    logits = MODEL.apply(params, record["text"][:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, record["text"][1:]).mean()


@jax.jit
def accuracy(params, records):
    logits = jax.vmap(MODEL.apply, (None, 0))(params, records["text"][:, :-1])
    return (logits.argmax(-1) == records["text"][:, 1:]).mean()


def pretrain(params, public, num_steps):
    # LoRA's B starts at zero and stays there: the pretrained model is that without LoRA.
    is_lora = jax.tree_util.tree_map_with_path(lambda path, _: "lora_" in jax.tree_util.keystr(path), params)
    optimizer = optax.chain(optax.adam(2e-3), optax.masked(optax.set_to_zero(), is_lora))

    @jax.jit
    def step(params, state, batch):
        gradient = jax.grad(lambda params: jax.vmap(loss_fn, (None, 0))(params, batch).mean())(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for index in np.random.default_rng(1).integers(len(public["text"]), size=(num_steps, 64)):
        params, state = step(params, state, {"text": public["text"][index]})
    return params


def passages(texts, count):
    codes = np.frombuffer("".join(texts).encode("ascii", "replace"), np.uint8).astype(np.int32)
    rows = codes[: codes.size // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    return {"text": np.random.default_rng(0).permutation(rows)[:count]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of pretraining, 64 passages each")
    parser.add_argument("--records", type=int, default=4000, help="public ones, and as many private ones")
    args = parser.parse_args(argv)
    code = [path.read_text("utf-8") for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    manual = list(pydoc_data.topics.topics.values())
    public, private = passages(code, args.records), passages(manual[::2], args.records)
    test = passages(manual[1::2], 1000)
    params = pretrain(MODEL.init(jax.random.key(0), public["text"][0, :-1]), public, args.steps)
    lora = qexp_jax.subspace.full(params, where="lora_")  # a regular expression on the paths of parameters
    key = qexp_jax.fresh_key()  # secret, for one release: never print, log or store it
    settings = {"epsilon": 1.0, "delta": 1e-5, "plan": qexp_jax.PlanOptions(subspace=lora)}
    release = qexp_jax.fine_tune(key, loss_fn, params, public=public, private=private, **settings)
    qexp_jax.verify(release.certificate)
    print(f"next character right: {accuracy(params, test):.3f} before, {accuracy(release.params, test):.3f} after")
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), params, release.params))
    print(f"verified: epsilon {release.certificate['epsilon']:g}; {sum(moved)} of {len(moved)} leaves moved")


if __name__ == "__main__":
    main()
