"""Hostile input: only documented errors, and never a release or a sum that is not finite or not bounded.

Shapes come from small fixed sets, so that few programs are compiled.
"""

import contextlib
import copy
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from problems import fine_tune, linear_loss, spd

import qexp_jax
from qexp_jax import clipping, hardened, ledger, precision, privacy, records, subspace
from qexp_jax.private_pass import exact_clipping

D = 3
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 1e-38, 65504.0, 3.4e38]
KEY = jax.random.key(31)


def fuzz(examples):
    return settings(
        deadline=None,
        derandomize=True,
        max_examples=examples,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # shrinking would run the private pass for minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@st.composite
def arrays(draw, *shape):
    """Any scale from 1e-30 to 1e30, some rows repeated, some values special."""
    seed, exponent = draw(st.integers(0, 2**32 - 1)), draw(st.floats(-30, 30))
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * 10.0**exponent
    if values.size and draw(st.booleans()):
        values = values[rng.integers(0, len(values), len(values))]
    for _ in range(draw(st.integers(0, 3)) if values.size else 0):
        values.flat[rng.integers(values.size)] = draw(st.sampled_from(SPECIAL))
    with np.errstate(over="ignore"):
        return values.astype(draw(st.sampled_from([np.float32, np.float16])))


PRECISIONS = {
    "dense": precision.dense(spd(KEY, D)),
    "low rank": precision.low_rank(0.1, jnp.eye(D)[:2], jnp.array([2.0, 1.0])),
}
SUM = jax.jit(clipping.clipped_sum, static_argnames=("loss_fn", "microbatch_size"))


def clipped(values, dtype, name, clip_norm):
    """Arguments of a private pass."""
    params = {"w": jnp.zeros(D, dtype)}
    units = {"g": jnp.asarray(values, jnp.float32)}
    rest = {"l2_clip_norm": clip_norm, "microbatch_size": 2}
    return (linear_loss, params, subspace.full(params), PRECISIONS[name], units), rest


@fuzz(60)
@given(
    data=st.data(),
    n=st.sampled_from([0, 1, 5]),
    kind=st.sampled_from([(jnp.float16, "dense"), (jnp.bfloat16, "low rank"), (jnp.float32, "dense")]),
    clip_exponent=st.integers(-9, 9),
)
def test_a_clipped_sum_is_finite_and_one_unit_moves_it_by_at_most_the_clip_norm(data, n, kind, clip_exponent):
    clip_norm = 10.0**clip_exponent
    args, rest = clipped(data.draw(arrays(n, D)), *kind, clip_norm)
    total, info = SUM(*args, **rest, mask=np.ones(n, bool))
    assert np.all(np.isfinite(total)) and info.num_units == n
    for i in range(n):
        without, _ = SUM(*args, **rest, mask=np.arange(n) != i)
        slack = 1 + 1e-4 + 1e-6 * n
        assert np.linalg.norm(np.asarray(total, np.float64) - np.asarray(without, np.float64)) <= clip_norm * slack


@fuzz(40)
@given(
    data=st.data(),
    n=st.sampled_from([0, 1, 5]),
    name=st.sampled_from(sorted(PRECISIONS)),
    clip_exponent=st.integers(-30, 30),
)
def test_an_integer_sum_moves_by_at_most_the_integer_clip_norm_exactly(data, n, name, clip_exponent):
    values = data.draw(arrays(n, D))
    args, rest = clipped(values, jnp.float32, name, 10.0**clip_exponent)
    total, _ = exact_clipping.integer_sum(*args, **rest)
    for i in range(n):
        args, _ = clipped(np.delete(values, i, axis=0), jnp.float32, name, 10.0**clip_exponent)
        moved = total - exact_clipping.integer_sum(*args, **rest)[0]
        assert sum(int(x) ** 2 for x in moved) <= hardened.INTEGER_CLIP_NORM**2


def loss(params, record):
    return (record["x"] @ params["w"].astype(jnp.float32) - record["y"]) ** 2 / 2


X = jax.random.normal(jax.random.key(1), (36, D))
DATA = {"x": X, "y": X @ jnp.arange(1.0, D + 1)}
PUBLIC, PRIVATE = jax.tree.map(lambda a: a[:30], DATA), jax.tree.map(lambda a: a[30:], DATA)


def tune(dtype=jnp.float32, **changes):
    arguments = {"public": PUBLIC, "private": PRIVATE, "epsilon": 1.0, "delta": 1e-5, "rounds": 2} | changes
    params = arguments.pop("params", {"w": jnp.ones(D, dtype)})
    return fine_tune(KEY, loss, params, **arguments)


def released(**changes):
    """Whether there is a release, which then is whole, finite and verifies."""
    try:
        release = tune(**changes)
    except ValueError:
        return False
    assert np.all(np.isfinite(np.asarray(release.params["w"], np.float64)))
    assert release.params["w"].shape == (D,)
    qexp_jax.verify(json.loads(json.dumps(release.certificate, allow_nan=False)))
    return True


@fuzz(25)
@given(x=arrays(6, D), y=arrays(6), dtype=st.sampled_from(DTYPES), hard=st.booleans())
def test_no_private_value_stops_or_spoils_a_release(x, y, dtype, hard):
    private = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    assert released(private=private, dtype=dtype, hardened=hard)


def test_public_values_give_a_finite_release_or_a_value_error():
    outcomes = set()

    @fuzz(40)
    @given(x=arrays(30, D), y=arrays(30), w=arrays(D), dtype=st.sampled_from(DTYPES))
    def check(x, y, w, dtype):
        public = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
        outcomes.add(released(public=public, params={"w": jnp.asarray(w, jnp.float32).astype(dtype)}))

    check()
    assert outcomes == {True, False}


NUMBERS = st.one_of(st.floats(), st.sampled_from([0, 1, -1, 1e-300, 1e300]), st.integers(-5, 2**70))


SETTINGS = {
    "epsilon": NUMBERS,
    "delta": NUMBERS,
    "damping": NUMBERS,
    "l2_clip_norm": NUMBERS,
    "precision_rank": st.integers(-1, 4),
    "microbatch_size": st.sampled_from([-1, 0, 1, 32, 2.5]),
    "public_count": st.one_of(st.integers(-1, 2**70), st.sampled_from([1, 2**31 - 1, 2**31, 1.5, True])),
    "rounds": st.sampled_from([-1, 0, 1, 2, True, 1.5]),
    "hardened": st.booleans(),
}


def test_settings_give_a_finite_release_or_a_value_error():
    outcomes = set()

    @fuzz(60)
    @given(changes=st.fixed_dictionaries({}, optional=SETTINGS))
    def check(changes):
        outcomes.add(released(**changes))

    check()
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    "changes",
    [
        {"params": {}},
        {"params": {"w": jnp.ones(D), "b": jnp.ones((0, 2))}, "private": {"x": jnp.ones((4, D)), "y": jnp.ones(4)}},
        {"params": {"w": None}},
        {"private": {}},
        {"private": {"x": jnp.ones(()), "y": jnp.ones(())}},
        {"private": {"x": jnp.ones((4, D))}},
        {"public": {"x": jnp.ones((1, D)), "y": jnp.zeros(1)}},
        {"private": jax.tree.map(lambda a: a[:1], PRIVATE)},
        {"unit_ids": np.zeros(6)},
        {"unit_ids": np.zeros(5)},
        {"unit_ids": np.zeros((6, 1))},
        {"unit_ids": np.arange(6), "max_records_per_unit": 0},
    ],
)
def test_other_shapes_give_a_release_or_a_value_error(changes):
    try:
        release = tune(**changes)
    except ValueError:
        return
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(release.params))


@fuzz(300)
@given(epsilon=st.one_of(NUMBERS, st.just(10**400)), delta=NUMBERS)
def test_privacy_arithmetic_never_exceeds_the_budget(epsilon, delta):
    try:
        mu, rho = privacy.mu_from_budget(epsilon, delta), privacy.rho_from_budget(epsilon, delta)
    except ValueError:
        return
    assert 0 < mu < math.inf and privacy.delta_from_mu(mu, epsilon) <= delta
    assert 0 < rho <= mu**2 / 2 * (1 + 1e-6) and privacy.delta_from_rho(rho, epsilon) <= delta


CERTIFICATES = [tune(hardened=hard).certificate for hard in (False, True)]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.integers(2**60, 10**330), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)


@fuzz(150)
@given(data=st.data(), certificate=st.sampled_from(CERTIFICATES), value=JSON)
def test_a_certificate_with_any_part_replaced_is_refused_with_a_value_error_or_verifies_again(data, certificate, value):
    certificate = node = copy.deepcopy(certificate)
    while True:
        name = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[name], dict | list) or not node[name] or data.draw(st.booleans()):
            break
        node = node[name]
    node[name] = value
    with contextlib.suppress(ValueError):
        qexp_jax.verify(certificate)


@fuzz(100)
@given(value=JSON)
def test_no_other_json_is_a_certificate(value):
    with pytest.raises(ValueError, match="ertificate"):
        qexp_jax.verify(value)


@fuzz(100)
@given(text=st.one_of(st.binary(max_size=60), JSON.map(lambda x: json.dumps(x).encode())), nested=JSON)
def test_no_other_file_is_a_ledger(tmp_path, text, nested):
    path = tmp_path / "ledger.json"
    if not path.exists():
        ledger.create(path, epsilon=1.0, delta=1e-5)
    body = json.loads((tmp_path / "whole").read_text()) if (tmp_path / "whole").exists() else None
    if body is None:
        body = json.loads(path.read_text())
        (tmp_path / "whole").write_text(json.dumps(body))
    for data in (text, json.dumps({"body": nested, "mac": body["mac"]}).encode(), json.dumps(body | {"mac": nested})):
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        with pytest.raises(ValueError, match="is refused"):
            ledger.spent(ledger.Ledger(path=path))


@fuzz(40)
@given(
    data=st.data(),
    n=st.sampled_from([0, 1, 4, 9]),
    cap=st.sampled_from([None, 1, 3]),
    multiple=st.sampled_from([1, 4]),
)
def test_grouping_and_padding_keep_each_record_once(data, n, cap, multiple):
    ids = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    values = np.arange(1.0, len(ids) + 1)
    grouped, mask = records.group_by_unit({"x": values}, np.array(ids, int), max_records_per_unit=cap)
    kept = np.sort(np.asarray(grouped["x"])[np.asarray(mask)])
    expected = [v for i, v in enumerate(values) if cap is None or ids[:i].count(ids[i]) < cap]
    np.testing.assert_array_equal(kept, expected)
    padded, mask = records.pad({"x": values}, multiple)
    np.testing.assert_array_equal(np.asarray(padded["x"])[np.asarray(mask)], values)
    assert len(mask) % multiple == 0 and len(mask) >= 1
