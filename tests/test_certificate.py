"""A certificate verifies as issued and after JSON; each corrupted one is refused with the field's name."""

import copy
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import NeighboringRelation

import qexp_jax
from qexp_jax import certificate as certificates
from qexp_jax import hardened, privacy, verification

DATA = {"x": jax.random.normal(jax.random.key(1), (60, 3)), "y": jax.random.normal(jax.random.key(2), (60,))}
PUBLIC = jax.tree.map(lambda a: a[:30], DATA)
PARAMS = {"w": jnp.ones(3)}
RELATIONS = list(NeighboringRelation)


def loss(params, record):
    return (record["x"] @ params["w"] - record["y"]) ** 2 / 2


def make_plan(rounds=3):
    multiplier = privacy.noise_multiplier(0.2, NeighboringRelation.REPLACE_SPECIAL)
    return qexp_jax.plan.make_plan(
        jax.random.key(3), loss, PARAMS, PUBLIC, loss, PUBLIC,
        num_units=50, noise_multiplier=multiplier, rounds=rounds, precision_rank=2,
    )  # fmt: skip


PLAN = make_plan()


def issued(relation=NeighboringRelation.REPLACE_SPECIAL, epsilon=1.0, delta=1e-5, discrete=False, **changes):
    """A certificate as `fine_tune` issues it."""
    rho = privacy.rho_from_budget(epsilon, delta)
    mu = (2 * rho) ** 0.5 if discrete else privacy.mu_from_budget(epsilon, delta)
    z = privacy.noise_multiplier(mu / PLAN.rounds**0.5, relation)
    noise = None
    if discrete:
        noise = hardened.discrete_noise(z, 3)
        z = noise.multiplier
    arguments = {
        "epsilon": epsilon, "delta": delta, "relation": relation, "num_units": 50, "num_units_from": "public_count",
        "unit": "one record", "noise_multiplier": z, "plan": PLAN, "discrete_noise": noise, "prng_impl": "threefry2x32",
        "provenance": certificates.make_provenance(PARAMS, PUBLIC, None),
    }  # fmt: skip
    return certificates.make_certificate(**arguments | changes)


PLAIN, HARDENED = issued(), issued(discrete=True)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("relation", RELATIONS)
def test_issued_certificates_verify_before_and_after_json(relation, discrete):
    certificate = issued(relation, discrete=discrete)
    qexp_jax.verify(certificate)
    qexp_jax.verify(json.loads(json.dumps(certificate, allow_nan=False)))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 1e-3), (0.1, 1e-9), (8.0, 1e-5), (20.0, 0.1), (60.0, 1e-20)])
def test_other_budgets_verify(epsilon, delta, discrete):
    qexp_jax.verify(issued(epsilon=epsilon, delta=delta, discrete=discrete))


def test_a_hardened_certificate_promises_zcdp_and_not_mu():
    assert HARDENED["mu"] is None and HARDENED["mu_per_round"] is None
    noise = HARDENED["discrete_noise"]
    rho = 3 * (noise["l2_clip_norm"] / noise["scale"]) ** 2 / 2
    np.testing.assert_allclose(HARDENED["zcdp_rho"], rho, rtol=1e-12)
    assert privacy.delta_from_rho(rho, 1.0) <= 1e-5
    assert not any("Idealised" in words for words in HARDENED["assumptions"])
    assert any("Idealised" in words for words in PLAIN["assumptions"])
    assert HARDENED["noise_multiplier"] > PLAIN["noise_multiplier"]


def leaves(node, path=()):
    if isinstance(node, dict | list):
        for name, inner in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(inner, (*path, name))
    else:
        yield path, node


def changed(certificate, path, value):
    certificate = copy.deepcopy(certificate)
    node = certificate
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return certificate


LEAVES = [(c, path, value) for c in (PLAIN, HARDENED) for path, value in leaves(c)]
IDS = [f"{'hardened' if c['hardened'] else 'plain'} {'.'.join(map(str, path))}" for c, path, _ in LEAVES]
# Nothing else in the certificate knows these.
FREE = {
    "num_units", "most_rounds",
    "subspace", "subspace_dim", "precision_rank", "damping", "privacy_unit", "provenance", "versions",
    "public_evidence", "expected_excess_loss_per_round", "prng_impl", "dtype", "num_units_from",
}  # fmt: skip


def wrong_kinds(value):
    if isinstance(value, str):
        return [1, 1.0, None, True, "", [value], {value: value}]
    if isinstance(value, bool) or value is None:
        return [0, 1.5, "true", [value], float("nan")]
    return [float("nan"), float("inf"), -float("inf"), 10**400, True, None, str(value), [value], {"a": value}]


@pytest.mark.parametrize(("certificate", "path", "value"), LEAVES, ids=IDS)
def test_a_value_of_another_kind_is_refused_with_its_field(certificate, path, value):
    name = [part for part in path if isinstance(part, str)][-1]
    for other in wrong_kinds(value):
        with pytest.raises(ValueError, match=name):
            qexp_jax.verify(changed(certificate, path, other))


@pytest.mark.parametrize(("certificate", "path", "value"), LEAVES, ids=IDS)
def test_a_value_that_the_others_contradict_is_refused(certificate, path, value):
    if path[0] in FREE or (path[0] == "geometries" and path[-1] == "l2_clip_norm"):
        return
    if isinstance(value, bool) or value is None or isinstance(value, str):
        others = [not value] if isinstance(value, bool) else [0.3] if value is None else [value + " "]
    else:
        others = [value + 1, max(1, value - 1)] if isinstance(value, int) else [value * 1.02, value * 0.98]
    for other in others:
        if path[-1] == "scale" or path == ("discrete_noise", "l2_clip_norm"):
            other += 10 * (other - value)  # one step of the grid is within rounding
        with pytest.raises(ValueError, match="Certificate field"):
            qexp_jax.verify(changed(certificate, path, other))


@pytest.mark.parametrize("certificate", [PLAIN, HARDENED], ids=["plain", "hardened"])
def test_missing_and_unknown_fields_are_refused_by_name(certificate):
    for name in certificate:
        with pytest.raises(ValueError, match=f"'{name}' of 'certificate' is missing"):
            qexp_jax.verify({k: v for k, v in certificate.items() if k != name})
    with pytest.raises(ValueError, match="'loss' of 'certificate' is unknown"):
        qexp_jax.verify(certificate | {"loss": 1.0})
    for whole in (None, [], "certificate"):
        with pytest.raises(ValueError, match="mapping"):
            qexp_jax.verify(whole)
    with pytest.raises(ValueError, match="schema"):
        qexp_jax.verify(certificate | {"schema": "qexp_jax/certificate/2"})


def consistent_but_wrong(relation, claimed):
    """A certificate whose formulas all use the sensitivity of another relation."""
    return issued(claimed) | {"neighboring_relation": relation.name, "neighbors": certificates.NEIGHBORS[relation]}


def test_replace_one_with_the_noise_of_zero_out_is_refused():
    wrong = consistent_but_wrong(NeighboringRelation.REPLACE_ONE, NeighboringRelation.REPLACE_SPECIAL)
    with pytest.raises(ValueError, match=r"budget\[0\].mu"):
        qexp_jax.verify(wrong)


def test_a_hardened_release_that_claims_the_exact_gaussian_delta_is_refused():
    mu = privacy.mu_from_budget(1.0, 1e-5)
    z = privacy.noise_multiplier(mu / PLAN.rounds**0.5, NeighboringRelation.REPLACE_SPECIAL)
    noise = hardened.discrete_noise(z, 3)
    with pytest.raises(ValueError, match="'delta'"):
        qexp_jax.verify(issued(noise_multiplier=noise.multiplier, discrete_noise=noise))


def test_an_epsilon_below_what_dp_accounting_finds_is_refused(monkeypatch):
    monkeypatch.setattr(verification, "_check_total", lambda certificate: None)  # the accountant alone
    qexp_jax.verify(PLAIN)
    for certificate, epsilon in ((PLAIN, 0.99), (HARDENED, 0.8)):
        with pytest.raises(ValueError, match="dp_accounting"):
            qexp_jax.verify(certificate | {"epsilon": epsilon})


def test_provenance_knows_values_names_shapes_and_dtypes():
    base = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)}
    others = [
        {"v": base["w"]}, {"w": base["w"].T.copy()}, {"w": base["w"].astype(np.float64)}, {"w": base["w"] + 1},
        {"w": base["w"].reshape(3, 2)}, {"w": base["w"].astype(jnp.bfloat16)}, {"w": base["w"], "k": jax.random.key(0)},
    ]  # fmt: skip
    digests = {certificates.sha256_of(tree) for tree in [base, *others]}
    assert len(digests) == 1 + len(others)
    assert certificates.sha256_of({"w": jnp.asarray(base["w"])}) == certificates.sha256_of(base)
    assert certificates.sha256_of({"w": np.asfortranarray(base["w"])}) == certificates.sha256_of(base)
    spelled = b"['w'] float32 (2, 3)\n" + base["w"].tobytes() + b"['z'] bfloat16 ()\n" + b"\x80\x3f"
    assert certificates.sha256_of(base | {"z": jnp.bfloat16(1)}) == hashlib.sha256(spelled).hexdigest()
    record = certificates.make_provenance(base, base, qexp_jax.subspace.count_sketch(jax.random.key(0), base, 2))
    assert len(record["subspace_sha256"]) == 64
