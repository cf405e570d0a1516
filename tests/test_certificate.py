"""A certificate verifies as issued and after JSON; each corrupted one is refused with the field's name."""

import copy
import dataclasses
import decimal
import fractions
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import fine_tune

import qexp_jax
from qexp_jax import NeighboringRelation, hardened, privacy, verification
from qexp_jax.privacy import certificate as certificates
from qexp_jax.quadratic import plan_terms

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


def issued(relation=NeighboringRelation.REPLACE_SPECIAL, epsilon=1.0, delta=1e-5, discrete=False, plan=PLAN, **changes):
    """A certificate as `fine_tune` issues it."""
    mu = (hardened if discrete else privacy).mu_from_budget(epsilon, delta)
    z = privacy.noise_multiplier(mu / plan.rounds**0.5, relation)
    noise = None
    if discrete:
        noise = hardened.discrete_noise(z, 3)
        z = noise.multiplier
    terms = plan_terms.terms(plan, [0.0] * len(plan.preconditioners.l2_clip_norm))
    arguments = {
        "epsilon": epsilon, "delta": delta, "relation": relation, "num_units": 50, "num_units_from": "public_count",
        "unit": "one record", "noise_multiplier": z, "plan": terms, "discrete_noise": noise,
        "prng_impl": "threefry2x32",
        "provenance": certificates.make_provenance(PARAMS, PUBLIC, None),
    }  # fmt: skip
    return certificates.make_certificate(**arguments | changes)


TERMS = {
    "features": "default", "num_axes": 5, "l2_clip_norm": 2.5, "rounding": 1e-6, "accepted": True,
    "effective_sample_size": 0.8, "training_steps": 70,
}  # fmt: skip


def issued_with_tilt(relation=NeighboringRelation.REPLACE_SPECIAL, discrete=False):
    """A certificate of a release whose rounds follow a tilt, of a tenth of the budget."""
    mu = (hardened if discrete else privacy).mu_from_budget(1.0, 1e-5)
    z, of_rounds = (privacy.noise_multiplier(mu * part**0.5, relation) for part in (0.1, 0.9 / PLAN.rounds))
    noise = None
    if discrete:
        z, noise = hardened.discrete_noise(z, 5).multiplier, hardened.discrete_noise(of_rounds, 3)
        of_rounds = noise.multiplier
    terms = TERMS | {"noise_multiplier": z}
    return issued(relation, discrete=discrete, noise_multiplier=of_rounds, discrete_noise=noise, tilt=terms)


def issued_for_weights(relation=NeighboringRelation.REPLACE_SPECIAL):
    """A certificate of `tilt.weights`: one draw of the whole budget, and no rounds."""
    z = privacy.noise_multiplier(privacy.mu_from_budget(1.0, 1e-5), relation)
    return certificates.make_tilt_certificate(
        epsilon=1.0, delta=1e-5, relation=relation, num_units=50, num_units_from="public_count", unit="one record",
        public=PUBLIC, prng_impl="threefry2x32", tilt=TERMS | {"noise_multiplier": z, "training_steps": 0},
    )  # fmt: skip


PLAIN, HARDENED = issued(), issued(discrete=True)
TILTED, HARDENED_TILTED, WEIGHTS = issued_with_tilt(), issued_with_tilt(discrete=True), issued_for_weights()


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("relation", RELATIONS)
def test_issued_certificates_verify_before_and_after_json(relation, discrete):
    certificate = issued(relation, discrete=discrete)
    qexp_jax.verify(certificate)
    qexp_jax.verify(json.loads(json.dumps(certificate, allow_nan=False)))


@pytest.mark.parametrize("relation", RELATIONS)
def test_certificates_of_tilts_verify(relation):
    """Of weights alone, and before rounds."""
    found = issued_with_tilt(relation), issued_with_tilt(relation, discrete=True), issued_for_weights(relation)
    for certificate in found:
        qexp_jax.verify(json.loads(json.dumps(certificate, allow_nan=False)))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 1e-3), (0.1, 1e-9), (8.0, 1e-5), (20.0, 0.1), (60.0, 1e-20)])
def test_other_budgets_verify(epsilon, delta, discrete):
    qexp_jax.verify(issued(epsilon=epsilon, delta=delta, discrete=discrete))


def random_budgets(count):
    """Log-uniform over the documented range."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        epsilon, delta = (math.exp(rng.uniform(*np.log(ends))) for ends in (privacy.EPSILON_RANGE, privacy.DELTA_RANGE))
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        rounds = int(rng.choice([1, 2, 8, 12, 24, 80, 300]))
        yield relation, epsilon, delta, bool(rng.integers(2)), PLAN._replace(rounds=rounds, most_rounds=rounds)


def test_random_budgets_verify():
    """What a release certifies is accepted, over the whole range, for all relations and numbers of rounds."""
    refused = []
    for budget in random_budgets(1000):
        try:
            qexp_jax.verify(issued(*budget))
        except ValueError as error:
            refused.append((*budget[:4], budget[4].rounds, str(error)))
    assert not refused, (len(refused), refused[:5])


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("epsilon", [1e-4, 1e4])
@pytest.mark.parametrize("delta", [1e-30, 0.999])
def test_corners_of_the_range_verify(epsilon, delta, discrete):
    for rounds in (1, 80):
        plan = PLAN._replace(rounds=rounds, most_rounds=rounds)
        certificate = issued(NeighboringRelation.REPLACE_ONE, epsilon, delta, discrete, plan)
        qexp_jax.verify(certificate)
        assert certificate["noise_multiplier"] < 2**27


@pytest.mark.parametrize(
    "budget", [{"epsilon": 0.99e-4}, {"epsilon": 1.01e4}, {"delta": 0.99e-30}, {"delta": 0.9991}], ids=str
)
def test_budgets_outside_the_range_are_refused(budget):
    """By who makes a certificate and by who reads one."""
    with pytest.raises(ValueError, match=f"Expected {next(iter(budget))} in"):
        issued(**budget)
    with pytest.raises(ValueError, match=f"{next(iter(budget))}'"):
        qexp_jax.verify(PLAIN | budget)


SCALARS = [
    np.float16, np.float32, np.float64, np.longdouble, jnp.float16, jnp.bfloat16, jnp.float32,
    fractions.Fraction, decimal.Decimal, np.asarray,
]  # fmt: skip


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: scalar.__name__)
def test_scalars_of_all_types_verify(scalar, discrete):
    """The budget is `float(scalar)`: the certificate is that of the Python floats, and JSON knows all of it."""
    epsilon, delta, count = scalar(0.7), scalar(1e-3), np.int16(50)
    certificate = issued(epsilon=epsilon, delta=delta, discrete=discrete, num_units=count)
    assert json.loads(json.dumps(certificate)) == issued(epsilon=float(epsilon), delta=float(delta), discrete=discrete)
    qexp_jax.verify(certificate)


def test_numbers_of_a_plan_may_be_scalars():
    """Of NumPy and JAX, as arithmetic on them makes them."""
    evidence = {k: np.int64(v) if isinstance(v, int) else np.float32(v) for k, v in PLAN.evidence.items()}
    changes = {"rounds": np.int64(3), "most_rounds": jnp.int32(80), "damping": jnp.float32(0.5)}
    plan = PLAN._replace(evidence=evidence, expected_cost=np.float32(0.1), **changes)
    certificate = issued(plan=plan, noise_multiplier=np.float64(PLAIN["noise_multiplier"]))
    qexp_jax.verify(json.loads(json.dumps(certificate)))


@pytest.mark.parametrize("options", [{}, {"hardened": True}], ids=["plain", "hardened"])
def test_releases_of_scalars_verify(options):
    """Budget and counts as NumPy and JAX hold them."""
    if options:
        pytest.importorskip("opendp")
    release = fine_tune(
        jax.random.key(0), loss, PARAMS, public=PUBLIC, private=jax.tree.map(lambda a: a[30:], DATA),
        epsilon=np.float32(0.1), delta=jnp.bfloat16(1e-5), rounds=np.int64(2), public_count=np.int32(30), **options,
    )  # fmt: skip
    assert release.certificate["epsilon"] == float(np.float32(0.1))
    assert release.certificate["delta"] == float(jnp.bfloat16(1e-5))
    qexp_jax.verify(json.loads(json.dumps(release.certificate)))


PROMISES = {
    "prng_impl": ["rbg", "unsafe_rbg", "quantum", "threefry2x32 "],
    "privacy_unit": ["everybody", "one Record", "one record of nobody"],
    "subspace": [
        "provably private", "full ", "directions in", "directions in nothing", "leaves matching head",
        "given operator!", "leaves matching 'a' and provably private", "leaves matching 'it's'", "full, private",
    ],
    "versions.jax": ["latest", "1.0, audited", "v1", "1..2"],
    "dtype": ["float16", "exact"],
    "discrete_noise.l2_clip_norm": [2**19],
    "public_evidence.audited": [1.0],
    "public_evidence.public_fraction_clipped": [-0.1, 1.1],
    "public_evidence.leading_share_of_energy": [-0.1, 1.1],
    "public_evidence.tuned_at_first": [7],
    "public_evidence.largest_curvature": [0.0, -1.0],
}  # fmt: skip


@pytest.mark.parametrize("field", PROMISES)
def test_made_up_promises_are_refused(field):
    """Fields that carry promises take known values only."""
    certificate = HARDENED if field.startswith("discrete") else PLAIN
    for value in PROMISES[field]:
        with pytest.raises(ValueError, match=field.rpartition(".")[2]):
            qexp_jax.verify(changed(certificate, field.split("."), value))


def test_known_promises_verify():
    for unit in certificates.PRIVACY_UNITS:
        qexp_jax.verify(PLAIN | {"privacy_unit": unit})
    for version in ("0.10", "1.2.3rc1", "0.11.0.dev20260101+0abc", "2!1.0.post1", "not installed"):
        qexp_jax.verify(changed(PLAIN, ["versions", "jax"], version))


WHERES = ["", "w", r"^w$|it's", r"w|\n", "w|\"|'", "w|é\n", "w|\\\\'"]


def library_subspaces():
    """One of each kind that the library makes, of the parameters of this module."""
    key, space = jax.random.key(0), qexp_jax.subspace
    full, gaussian = space.full(PARAMS), space.gaussian(key, PARAMS, 2)
    composed = space.compose(gaussian, jnp.ones((2, 1)))
    named = space.compose(full, jnp.eye(3)[:, :2], name="provably private")
    top, _ = qexp_jax.curvature.top_eigenspace(loss, PARAMS, PUBLIC, 1, within=named)
    quoted = [space.full(PARAMS, where=where) for where in WHERES]
    return {
        "directions in full": [named],
        "directions in gaussian": [composed, space.compose(gaussian, jnp.ones((2, 1)), name="full")],
        "gaussian": [gaussian, space.orthonormalise(gaussian), space.gaussian(key, PARAMS, 2, stored=False)],
        "top eigenspace in directions in full": [space.compose(top, jnp.eye(1), name="provably private"), top],
        "orthonormal": [space.orthonormal(key, PARAMS, 2)],
        "count_sketch": [space.count_sketch(key, PARAMS, 2, where="w")],
        "span": [space.span(PARAMS, {"w": jnp.eye(3)[:2]})],
        "given operator": [dataclasses.replace(full, name="provably private")],
    } | {f"leaves matching {where!r}": [s] for where, s in zip(WHERES, quoted, strict=True)}


def test_names_of_subspaces_are_certified():
    """Of whatever the library makes, and never a user's own text."""
    for name, spaces in library_subspaces().items():
        for space in spaces:
            assert qexp_jax.subspace.certified_name(space) == name
            plan = PLAN._replace(subspace=dataclasses.replace(PLAN.subspace, name=name))
            qexp_jax.verify(PLAIN | {"subspace": issued(plan=plan)["subspace"]})


def test_a_hardened_certificate_promises_zcdp_and_not_mu():
    assert HARDENED["mu"] is None and HARDENED["mu_per_round"] is None
    noise = HARDENED["discrete_noise"]
    rho = 3 * (noise["l2_clip_norm"] / noise["scale"]) ** 2 / 2
    np.testing.assert_allclose(HARDENED["zcdp_rho"], rho, rtol=1e-12)
    assert privacy.delta_from_rho(rho, 1.0) <= 1e-5
    assert not any("Ideal Gaussian" in words for words in HARDENED["assumptions"])
    assert any("Ideal Gaussian" in words for words in PLAIN["assumptions"])
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


NAMED = {"plain": PLAIN, "hardened": HARDENED, "tilted": TILTED, "weights": WEIGHTS}
LEAVES = [(c, path, value) for c in NAMED.values() for path, value in leaves(c)]
IDS = [f"{name} {'.'.join(map(str, path))}" for name, c in NAMED.items() for path, _ in leaves(c)]
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


def is_schema_of_weights(certificate, name):
    """By it their fields are known: without it they are taken for those of a release."""
    return certificate is WEIGHTS and name == "schema"


@pytest.mark.parametrize(("certificate", "path", "value"), LEAVES, ids=IDS)
def test_a_value_of_another_kind_is_refused_with_its_field(certificate, path, value):
    name = [part for part in path if isinstance(part, str)][-1]
    name = "Certificate field" if is_schema_of_weights(certificate, name) else name
    for other in wrong_kinds(value):
        with pytest.raises(ValueError, match=name):
            qexp_jax.verify(changed(certificate, path, other))


@pytest.mark.parametrize(("certificate", "path", "value"), LEAVES, ids=IDS)
def test_a_value_that_the_others_contradict_is_refused(certificate, path, value):
    if path[0] in FREE or (path[0] == "geometries" and path[-1] != "tuned_dim"):
        return
    if (
        path[0] == "tilt"
        and value is not None
        and path[-1] != ("training_steps" if certificate is WEIGHTS else "accepted")
    ):
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


@pytest.mark.parametrize("certificate", NAMED.values(), ids=NAMED)
def test_missing_and_unknown_fields_are_refused_by_name(certificate):
    for name in certificate:
        missing = "" if is_schema_of_weights(certificate, name) else f"'{name}' "
        with pytest.raises(ValueError, match=f"{missing}of 'certificate' is missing"):
            qexp_jax.verify({k: v for k, v in certificate.items() if k != name})
    with pytest.raises(ValueError, match="'loss' of 'certificate' is unknown"):
        qexp_jax.verify(certificate | {"loss": 1.0})
    for whole in (None, [], "certificate"):
        with pytest.raises(ValueError, match="mapping"):
            qexp_jax.verify(whole)
    with pytest.raises(ValueError, match="Certificate field" if certificate is WEIGHTS else "schema"):
        qexp_jax.verify(certificate | {"schema": "qexp_jax/certificate/1"})


OTHER_BUDGETS = {
    "no tilt": lambda c: c | {"budget": c["budget"][1:]},
    "tilt last": lambda c: c | {"budget": c["budget"][1:] + c["budget"][:1]},
    "two tilts": lambda c: c | {"budget": c["budget"][:1] + c["budget"]},
    "no terms": lambda c: c | {"tilt": None},
    "a round more": lambda c: c | {"budget": c["budget"] + c["budget"][-1:]},
    "terms that lack one": lambda c: c | {"tilt": {k: v for k, v in c["tilt"].items() if k != "accepted"}},
    "terms with one more": lambda c: c | {"tilt": c["tilt"] | {"loss": 0.1}},
    "steps without weights": lambda c: c | {"tilt": c["tilt"] | {"accepted": False}},
    "weights without steps": lambda c: c | {"tilt": c["tilt"] | {"training_steps": 0}},
    "more noise": lambda c: changed(c, ["budget", 0, "noise_multiplier"], 1.1 * c["budget"][0]["noise_multiplier"]),
    "schema of weights": lambda c: c | {"schema": certificates.TILT_SCHEMA},
    "mechanism of weights": lambda c: c | {"mechanism": certificates.TILT_MECHANISM},
}


@pytest.mark.parametrize("name", OTHER_BUDGETS)
@pytest.mark.parametrize("certificate", [TILTED, HARDENED_TILTED], ids=["plain", "hardened"])
def test_a_tilt_that_the_budget_contradicts_is_refused(certificate, name):
    with pytest.raises(ValueError, match="Certificate field"):
        qexp_jax.verify(OTHER_BUDGETS[name](certificate))


def test_budgets_without_their_terms_are_refused():
    """Weights have one draw; a release without a tilt has no share of it."""
    share = WEIGHTS["budget"]
    for wrong in (
        WEIGHTS | {"budget": share * 2},
        WEIGHTS | {"tilt": None},
        WEIGHTS | {"hardened": True},
        WEIGHTS | {"schema": certificates.SCHEMA},
        PLAIN | {"budget": share + PLAIN["budget"]},
        PLAIN | {"tilt": TERMS},
    ):
        with pytest.raises(ValueError, match="Certificate field"):
            qexp_jax.verify(wrong)


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
