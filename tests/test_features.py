"""Default features of records against their rule in NumPy, whatever the records are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax import features, subspace
from qexp_jax.fine_tuning import tilting
from qexp_jax.model import isolation
from qexp_jax.quadratic import default_features

KEY, N = jax.random.key(3), 300
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(N, 5)).astype(np.float32)
IMAGES = (_RNG.normal(size=(N, 4, 3)) * np.arange(1, 4) / 3).astype(np.float32)
TOKENS = _RNG.choice([3, 7, 250, 259, 300, 1000, 4099], size=(N, 12), p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])
LABEL = _RNG.choice([2, 5, 9], size=N, p=[0.5, 0.3, 0.2])
SCALES = np.array([1.0, 10.0, 5.0, 3.0, 4.0], np.float32)  # none below a tenth of their root mean square


# --- the rule, in NumPy ---


def over_total(columns):
    """Centred, and over the root of the sum of variances."""
    columns = columns - columns.mean(axis=0)
    return columns / np.sqrt(np.sum(columns.var(axis=0)))


def table(x):
    x = np.asarray(x, np.float64)
    return over_total(x / x.std(axis=0))


def image(x):
    return over_total(np.asarray(x, np.float64).reshape(N, -1))


def shares(tokens):
    return over_total(np.stack([np.bincount(row % 256, minlength=256) / len(row) for row in tokens]))


def indicators(label):
    return np.asarray(label)[:, None] == np.unique(label)


def quarters(label):
    label = np.asarray(label, np.float64)
    return np.sum(label[:, None] > np.quantile(label, [0.25, 0.5, 0.75]), axis=1)[:, None] == np.arange(4)


KEYS = jax.random.split(KEY, N)
HALF = jnp.asarray(X, jnp.bfloat16), jnp.asarray(X[:, 0], jnp.float16)
# Records; their columns; their labels.
KINDS = {
    "images": ({"x": IMAGES, "y": LABEL}, [image(IMAGES)], [indicators(LABEL)]),
    "table": ({"x": X * SCALES}, [table(X)], []),
    "tokens": ({"t": TOKENS, "y": LABEL}, [shares(TOKENS)], [indicators(LABEL)]),
    "leaves": (
        {"a": X, "b": {"c": IMAGES, "d": X[:, 0] > 0}, "y": LABEL},
        [table(X), image(IMAGES)],
        [indicators(X[:, 0] > 0), indicators(LABEL)],
    ),
    "float labels": ({"x": X, "y": X[:, 1]}, [table(X)], [quarters(X[:, 1])]),
    "columns of one": ({"x": X, "y": LABEL[:, None]}, [table(X)], [indicators(LABEL)]),
    "flags": ({"x": X > 0.5, "y": X[:, 0] > 0}, [table(X > 0.5)], [indicators(X[:, 0] > 0)]),
    "half precision": ({"x": HALF[0], "y": HALF[1]}, [table(HALF[0])], [quarters(HALF[1])]),
    "bytes": ({"x": (40 * abs(IMAGES)).astype(np.uint8)}, [image((40 * abs(IMAGES)).astype(np.uint8))], []),
    "constant label": ({"x": X, "y": np.full(N, 4)}, [table(X)], []),
    "labels alone": ({"y": LABEL}, [], [indicators(LABEL)]),
    "typed keys": ({"x": X, "key": KEYS}, [table(X)], []),
    "empty leaf": ({"x": X, "none": np.zeros((N, 0), np.float32)}, [table(X)], []),
    "five labels": (
        {str(i): X[:, i] for i in range(5)},  # too many: they are numbers
        [over_total(X[:, i : i + 1].astype(np.float64)) for i in range(5)],
        [],
    ),
}


def expected_kernel(columns, labels):
    """Inner products of the features before the last projection."""
    inner = np.zeros((N, N))
    if columns:
        columns = np.concatenate(columns, axis=1)
        inner = columns @ columns.T / np.mean(np.sum(columns**2, axis=1))
    if not labels:
        return inner
    return sum((label.astype(float) @ label.T) * (inner + 0.25) for label in labels)


def raw_of(fitted, records):
    return np.asarray(jax.vmap(lambda r: fitted.raw(fitted.arrays, fitted.params, r))(records), np.float64)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    records, columns, labels = KINDS[request.param]
    records = jax.tree.map(jnp.asarray, records)
    return records, columns, labels, features.fit(KEY, records, ())


def test_the_rule_is_numpys(kind):
    """All inner products of all records."""
    records, columns, labels, fitted = kind
    raw = raw_of(fitted, records)
    np.testing.assert_allclose(raw @ raw.T, expected_kernel(columns, labels), atol=2e-3)
    if labels and columns:  # the twin without them
        assert np.max(abs(raw @ raw.T - expected_kernel(columns, []))) > 0.1


def test_axes_are_principal(kind):
    """Centred, without correlation, each of variance the root of its eigenvalue."""
    records, *_, fitted = kind
    rows = np.asarray(features.apply_each(fitted, records), np.float64)
    covariance = np.cov(raw_of(fitted, records).T, bias=True)
    eigenvalues = np.linalg.eigvalsh(np.atleast_2d(covariance))[::-1][: rows.shape[1]]
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-4)
    found = np.atleast_2d(np.cov(rows.T, bias=True))
    is_clear = eigenvalues > 1e-4 * eigenvalues[0]
    np.testing.assert_allclose(found[np.ix_(is_clear, is_clear)], np.diag(eigenvalues[is_clear] ** 0.5), atol=3e-3)
    assert rows.shape[1] <= features.NUM_AXES


def test_a_record_stands_alone(kind):
    """Features of one record, and the gradient of their linear loss, are its row; maps repeat; records are apart."""
    records, *_, fitted = kind
    rows = features.apply_each(fitted, records)
    one = jax.tree.map(lambda a: a[7], records)
    phi = features.apply(fitted, one)
    np.testing.assert_allclose(phi, rows[7], atol=3e-4)  # axes of hardly any spread are divided by its root
    params = features.linear_params(fitted)
    gradient = jax.grad(features.linear_loss(fitted.raw), allow_int=True)(params, one)
    np.testing.assert_allclose(gradient["axes"], phi, atol=1e-6)
    np.testing.assert_array_equal(features.apply_each(features.fit(KEY, records, ()), records), rows)
    layout = subspace.layout_of(params, "^axes$")
    isolation.check_loss(features.linear_loss(fitted.raw), layout, params, records)


# --- scales ---


def phi(records, **options):
    records = jax.tree.map(jnp.asarray, records)
    fitted = features.fit(KEY, records, (), **options)
    rows = np.asarray(features.apply_each(fitted, records), np.float64)
    return rows @ rows.T


def test_units_of_columns_do_not_count():
    """Of a table each is over its own spread; of an image none."""
    np.testing.assert_allclose(phi({"x": X * SCALES + 100}), phi({"x": X}), atol=1e-3)
    turned = IMAGES * np.array([1, 5, 1], np.float32)
    np.testing.assert_allclose(phi({"x": IMAGES * 1000 - 5}), phi({"x": IMAGES}), atol=1e-2)
    assert np.max(abs(phi({"x": turned}) - phi({"x": IMAGES}))) > 0.1


def test_a_still_column_is_not_blown_up():
    """Its spread counts as a tenth of the others' at least."""
    still = X * np.array([1, 1, 1, 1, 1e-6], np.float32)
    np.testing.assert_allclose(phi({"x": still}), phi({"x": X[:, :4]}), atol=1e-3)


def test_values_beyond_the_public_ones_are_finite():
    """A label that public records lack is no label, a remainder of very many; a NaN is the first quarter."""
    public = {"x": jnp.asarray(X), "y": jnp.asarray(LABEL), "z": jnp.asarray(X[:, 1])}
    fitted = features.fit(KEY, public, ())
    record = {"x": jnp.zeros(5), "y": jnp.asarray(77), "z": jnp.asarray(jnp.nan)}
    raw = fitted.raw(fitted.arrays, (), record)
    assert np.all(np.isfinite(raw)) and int(np.sum(np.isclose(raw, 0.5))) == 1
    many = {"x": jnp.asarray(X), "y": jnp.asarray(_RNG.integers(0, 10**6, N))}
    assert features.fit(KEY, many, ()).center.shape == (default_features._MOST_VALUES * 6,)


def test_a_million_columns_are_folded():
    """With random signs inner products stay; without them columns that take turns would cancel."""
    signs = np.where(np.arange(1_000_000) // 4096 % 2, -1, 1).astype(np.float32)
    amount = _RNG.normal(size=(12, 1)).astype(np.float32)
    records = {"x": jnp.asarray(amount * signs), "y": jnp.arange(12) % 2}
    fitted = features.fit(KEY, records, ())
    columns, label = over_total(amount.astype(np.float64)), indicators(np.arange(12) % 2).astype(float)
    expected = (label @ label.T) * (columns @ columns.T + 0.25)
    raw = raw_of(fitted, records)
    np.testing.assert_allclose(raw @ raw.T, expected, atol=0.02)
    folded = default_features._folded(jnp.asarray(amount * signs) / 1000, jnp.ones(1_000_000))
    assert np.linalg.norm(folded) < 0.1 * np.linalg.norm(amount)


def test_shifts_within_labels_are_seen():
    """Two labels move apart, so that the mean of all inputs stays; the twin without labels sees nothing."""
    rng = np.random.default_rng(5)

    def drawn(shift):
        y = rng.integers(0, 2, 2000)
        x = rng.normal(size=(2000, 3)) + shift * (2 * y[:, None] - 1)
        return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y)}

    public, private = drawn(0.0), drawn(0.3)

    def largest_score(pick):
        fitted = features.fit(KEY, pick(public), ())
        rows = [np.asarray(features.apply_each(fitted, pick(x))) for x in (public, private)]
        return np.max(abs(rows[0].mean(0) - rows[1].mean(0)) / np.sqrt((rows[0].var(0) + rows[1].var(0)) / 2000))

    assert largest_score(lambda records: records) > 7
    assert largest_score(lambda records: {"x": records["x"]}) < 4


# --- functions of the caller's own ---


def test_functions_of_one_and_two_arguments():
    """Any pytree of arrays, with parameters where they are asked for; kept in the map, and not in its program."""
    public, params = {"x": jnp.asarray(X)}, {"w": jnp.arange(1.0, 6.0)}
    alone = features.fit(KEY, public, params, lambda record: {"a": record["x"][:2], "b": record["x"][2]})
    assert alone.params == () and raw_of(alone, public).shape == (N, 3)

    def activations(params, record):
        return record["x"] * params["w"]

    with_params = features.fit(KEY, public, params, activations)
    np.testing.assert_allclose(raw_of(with_params, public), X * np.arange(1.0, 6.0), rtol=1e-5)
    twice = with_params._replace(params={"w": 2 * params["w"]})
    np.testing.assert_allclose(raw_of(twice, public), 2 * X * np.arange(1.0, 6.0), rtol=1e-5)


def test_a_default_is_no_argument():
    """Whoever binds a setting by a default has a function of the record alone."""
    public = {"x": jnp.asarray(X)}
    fitted = features.fit(KEY, public, (), lambda record, scale=2.0: scale * record["x"])
    np.testing.assert_allclose(raw_of(fitted, public), 2 * X, rtol=1e-5)


NOTHING = {
    "constant numbers": ({"x": np.ones((N, 3), np.float32)}, None),
    "one label": ({"y": np.ones(N, int)}, None),
    "typed keys": ({"key": KEYS}, None),
    "one record": ({"x": X[:1]}, None),
    "constant function": ({"x": X}, lambda record: jnp.ones(3)),
    "function without result": ({"x": X}, lambda record: {}),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_says_nothing_has_no_map(name):
    """By default there is no tilt then; a function of the caller's own is refused."""
    records, function = NOTHING[name]
    public = jax.tree.map(jnp.asarray, records)
    assert features.fit(KEY, public, (), function) is None
    if function is None:
        assert tilting.prepare(KEY, (), public) is None
        return
    with pytest.raises(ValueError, match="features that vary"):
        tilting.prepare(KEY, (), public, function)


@pytest.mark.parametrize("function", [lambda record: record["x"] * jnp.nan, 3])
def test_what_is_no_finite_function_is_refused(function):
    with pytest.raises(ValueError, match="features"):
        tilting.prepare(KEY, (), {"x": jnp.asarray(X)}, function)


def test_a_record_of_another_shape_counts_as_an_average_one():
    public = {"x": jnp.asarray(X)}
    fitted = features.fit(KEY, public, ())
    np.testing.assert_allclose(features.apply(fitted, {"x": jnp.ones(X.shape[1] + 2)}), 0, atol=1e-6)
    assert jnp.any(features.apply(fitted, {"x": jnp.ones(X.shape[1])}) != 0)


def test_features_that_mix_records_are_refused():
    def mixing(record):
        return jax.lax.pmean(record["x"], "data")

    with pytest.raises((ValueError, NameError)):
        tilting.prepare(KEY, (), {"x": jnp.asarray(X)}, mixing)

    def seen(record):
        jax.debug.print("{}", record["x"])
        return record["x"]

    with pytest.raises(ValueError, match="pure"):
        tilting.prepare(KEY, (), {"x": jnp.asarray(X)}, seen)
