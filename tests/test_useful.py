"""A release is finite, moves nothing of which the public records know nothing, and works where JAX is configured so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import fine_tune

import qexp_jax
from qexp_jax import ledger, mechanism, subspace
from qexp_jax.model import operations
from qexp_jax.private_pass import noise

KEY = jax.random.key(3)
BUDGET = {"epsilon": 8.0, "delta": 1e-5}


def cross_entropy(logits, label):
    return jax.nn.logsumexp(logits) - logits[label]


def data(n, seed, width=80, seen=None):
    """Two classes; columns from `seen` on are zero."""
    x = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    x[:, seen:] *= seen is None
    return {"x": x, "label": (x[:, 0] + x[:, 1] > 0).astype(np.int32)}


def linear(params, record):
    return cross_entropy(record["x"] @ params["w"] + params["b"], record["label"])


LINEAR = {"w": jnp.zeros((80, 2)), "b": jnp.zeros(2)}


def encoded(params, record):
    hidden = jnp.tanh(record["x"] @ jax.lax.stop_gradient(params["encoder"]))
    return cross_entropy(hidden @ params["head"], record["label"])


def in_a_loop(params, record):
    """The encoder is used in a scan, and what is behind it has no gradient."""
    step = lambda x, _: (jnp.tanh(x @ jax.lax.stop_gradient(params["encoder"])), None)
    return cross_entropy(jax.lax.scan(step, record["x"], None, length=2)[0] @ params["head"], record["label"])


@pytest.mark.parametrize("loss", [encoded, in_a_loop])
def test_still_leaves_stay(loss):
    """Behind `stop_gradient`, in a head that the loss does not use, of no size: bit for bit; and not in the norm."""
    params = {
        "encoder": jax.random.normal(KEY, (20, 20)) / 4,
        "head": jnp.ones((20, 2)),
        "other": jnp.ones((20, 3)),
        "none": jnp.zeros((0, 3)),
    }
    release = fine_tune(KEY, loss, params, public=data(300, 1, 20), private=data(200, 2, 20), **BUDGET)
    assert release.certificate["subspace_dim"] == 40
    for name in ("encoder", "other", "none"):
        np.testing.assert_array_equal(release.params[name], params[name])
    assert jnp.abs(release.params["head"] - 1).max() > 0.01


def test_subspaces_of_still_leaves_are_refused():
    params = {"encoder": jnp.ones((5, 5)), "head": jnp.ones((5, 2))}
    settings = {"public": data(30, 1, 5), "private": data(20, 2, 5), **BUDGET}
    for space in (subspace.full(params), subspace.gaussian(KEY, params, 3)):
        with pytest.raises(ValueError, match=r"does not depend, \['encoder'\]: leave them out by where="):
            fine_tune(KEY, encoded, params, subspace=space, **settings)
    release = fine_tune(KEY, encoded, params, subspace=subspace.full(params, where="head"), **settings)
    np.testing.assert_array_equal(release.params["encoder"], 1)


def test_a_loss_of_no_tuned_leaf_is_refused():
    with pytest.raises(ValueError, match="found a gradient that is zero"):
        fine_tune(KEY, lambda p, r: jnp.sum(r["x"]), LINEAR, public=data(30, 1), private=data(20, 2), **BUDGET)


def test_dependence_is_read_off_the_trace():
    x = [jnp.ones(3)] * 6

    def loss(x, y):
        a, b, c, d, e, f = x
        constant = jnp.sum(a)  # a gradient of ones depends on nothing, and moves all the same
        held = jax.lax.stop_gradient(b) @ y + jnp.sum(jnp.where(y > 0, c, jax.lax.stop_gradient(d)))
        return constant + held + jnp.sum(jnp.round(e)) + 0 * jnp.sum(f)

    assert operations.moving_arguments(loss, x, jnp.ones(3)) == (True, False, True, False, False, True)


def embedded(params, record):
    hidden = jnp.tanh(jnp.mean(params["rows"][record["tokens"]], axis=0))
    return cross_entropy(hidden @ params["head"], record["label"])


def texts(n, seed, vocabulary):
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (n, 9)).astype(np.int32)
    return {"tokens": tokens, "label": (np.sum(tokens % 2, axis=1) > 4).astype(np.int32)}


UNSEEN = {
    "columns": (linear, LINEAR, data(300, 1, seen=50), data(200, 2), lambda p: (p["w"][:50], p["w"][50:])),
    "embedding rows": (
        embedded,
        {"rows": jax.random.normal(KEY, (60, 4)), "head": jax.random.normal(KEY, (4, 2))},
        texts(300, 1, 40),
        texts(200, 2, 60),
        lambda p: (p["rows"][:40], p["rows"][40:]),
    ),
}


@pytest.mark.parametrize(
    "options", [{}, {"precision_rank": 4}, {"precision_rank": 4, "epsilon": 0.5}, {"hardened": True}]
)
@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_public_record_moves_is_held(name, options):
    """The noise of a step there would be all that it brings; and the certificate says how much is tuned."""
    loss, params, public, private, parts = UNSEEN[name]
    release = fine_tune(KEY, loss, params, public=public, private=private, **BUDGET | options)
    qexp_jax.verify(release.certificate)
    moved = jax.tree.map(jnp.subtract, release.params, params)
    seen, unseen = parts(moved)
    np.testing.assert_array_equal(unseen, 0)
    assert jnp.abs(seen).max() > 1e-4
    assert release.certificate["subspace_dim"] == sum(x.size for x in params.values()) - unseen.size


@pytest.mark.parametrize("value", ["loss", "gradient"])
def test_a_public_record_that_is_not_finite_costs_nothing(value, tmp_path):
    """One of 200, of a class without a logit, or whose gradient alone is infinite."""
    public = data(200, 1)
    account = ledger.create(tmp_path / "ledger.json", epsilon=10.0, delta=1e-5)
    public["label"][0] = 2 if value == "loss" else public["label"][0]
    public["x"][0] = 1.0 if value == "loss" else 3e38

    def loss(params, record):
        if value == "loss":
            logits = jnp.append(record["x"] @ params["w"], jnp.nan)
            return jax.nn.logsumexp(logits[:2]) - logits[record["label"]]
        return linear(params, record)

    with pytest.raises(ValueError, match="public"):
        fine_tune(KEY, loss, LINEAR, public=public, private=data(90, 2), ledger=account, **BUDGET)
    assert ledger.spent(account).releases == 0


def test_a_release_that_is_not_finite_is_not_returned(monkeypatch):
    monkeypatch.setattr(noise, "noisy_sum", lambda key, total, *rest: jnp.full(162, jnp.nan))
    with pytest.raises(ValueError, match="finite released parameters, of which nothing is returned"):
        fine_tune(KEY, linear, LINEAR, public=data(200, 1), private=data(90, 2), **BUDGET)


def steep(params, record):
    return cross_entropy((record["x"] * jnp.where(jnp.arange(80) < 4, 1, 1e-12)) @ params, record["label"])


def test_a_damping_that_float32_cannot_hold_is_refused():
    """Rounding along steep directions would come out of whitening in the others, and has to be paid for."""
    settings = {"public": data(200, 1), "private": data(90, 2), "precision_rank": 8, **BUDGET}
    rounding = [
        fine_tune(KEY, linear, LINEAR, damping=d, **settings).certificate["geometries"][0]["rounding"]
        for d in (1e-2, 1e-8)
    ]
    assert 0 < rounding[0] < rounding[1] < 0.02
    with pytest.raises(ValueError, match="damping=1e-38 is too small"):
        fine_tune(KEY, steep, jnp.zeros((80, 2)), **settings | {"damping": 1e-38})


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e15])
def test_losses_of_any_scale_are_tuned_or_refused(scale, tmp_path):
    """Before anything is paid for."""
    account = ledger.create(tmp_path / "ledger.json", epsilon=10.0, delta=1e-5)
    loss = lambda params, record: scale * linear(params, record)
    run = functools.partial(
        qexp_jax.fine_tune, KEY, loss, LINEAR, public=data(300, 1), private=data(300, 2), ledger=account, **BUDGET
    )
    if scale in (1e-18, 1e15):
        with pytest.raises(ValueError, match="multiply the loss"):
            run()
        assert ledger.spent(account).releases == 0
        return
    test, params = data(500, 3), run().params
    found = np.argmax(test["x"] @ np.asarray(params["w"]) + np.asarray(params["b"]), axis=1)
    assert np.mean(found == test["label"]) > 0.8


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_all_generators_draw_threefry_noise(impl):
    """Of all their words: under vmap these generators would see the first key or word alone."""
    key = jax.random.key(7, impl=impl)
    release, again = (
        fine_tune(k, linear, LINEAR, public=data(200, 1), private=data(90, 2), rounds=1, **BUDGET) for k in (key, key)
    )
    np.testing.assert_array_equal(release.params["w"], again.params["w"])
    assert release.certificate["prng_impl"] == "threefry2x32"
    words = jax.random.key_data(key)
    for i in range(words.size):
        other = jax.random.wrap_key_data(words.at[i].add(1), impl=impl)
        assert mechanism.protecting_key(other, jnp.ones(3)) != mechanism.protecting_key(key, jnp.ones(3))
    for i in range(3):  # and all words of what is protected
        changed = jnp.ones(3).at[i].set(2.0)
        assert mechanism.protecting_key(key, changed) != mechanism.protecting_key(key, jnp.ones(3))


@jax.custom_vjp
def squared(x):
    return x**2


squared.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))


@pytest.mark.parametrize("width", [3, 80])
def test_losses_with_reverse_rules_are_tuned(width):
    """Forward mode, which such a rule does not have, is not chosen for few parameters."""
    loss = lambda params, record: squared(record["x"] @ params - 2.0)
    public, private = ({"x": data(n, n, width)["x"]} for n in (200, 100))
    release = fine_tune(KEY, loss, jnp.zeros(width), public=public, private=private, **BUDGET)
    assert jnp.all(jnp.isfinite(release.params))


@pytest.mark.parametrize("setting", ["rank", "dtype"])
@pytest.mark.parametrize("options", [{}, {"unit_ids": np.arange(90) // 3}, {"subspace": "sketch"}, {"hardened": True}])
def test_promotion_may_be_forbidden(setting, options):
    """By whoever calls: the release is that of JAX's defaults."""
    if "subspace" in options:
        options = {"subspace": subspace.count_sketch(KEY, LINEAR, 20)}
    forbid = {"rank": jax.numpy_rank_promotion("raise"), "dtype": jax.numpy_dtype_promotion("strict")}[setting]
    run = functools.partial(
        fine_tune, KEY, linear, LINEAR, public=data(200, 1), private=data(90, 2), rounds=1, **BUDGET, **options
    )
    with forbid:
        found = run()
    if not options.get("hardened"):
        np.testing.assert_array_equal(found.params["w"], run().params["w"])
