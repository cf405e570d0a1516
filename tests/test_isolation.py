"""Records are isolated: what `jax.vmap` may not do to each record alone is refused by the trace of a loss.

The oracle is the gradient of one record in a microbatch, which must be the same, bit by bit, whatever the others hold.
"""

import flax.linen as nn
import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import primitives
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import fine_tune, network, network_loss
from test_finetune import BUDGET, regression, regression_loss

from qexp_jax import records as record_trees
from qexp_jax import subspace
from qexp_jax.data import validation
from qexp_jax.model import isolation

KEY = jax.random.key(3)
WIDTH = 12
VECTOR = {"w": jnp.linspace(0.1, 1.0, WIDTH)}


def check(loss, params, records):
    isolation.check_loss(loss, subspace.layout_of(params), params, records)


def one(records):
    return jax.tree.map(lambda x: x[0], records)


# --- ordinary losses ---


def vectors(key=KEY):
    return {
        "x": jax.random.normal(key, (4, WIDTH)),
        "label": jnp.arange(4),
        "bytes": jnp.arange(4 * WIDTH, dtype=jnp.uint8).reshape(4, WIDTH),
        "flag": jnp.arange(4) % 2 == 0,
        "low": jax.random.normal(key, (4, WIDTH), jnp.bfloat16),
        "key": jax.random.split(key, 4),
    }


def of_vector(function):
    """A loss of w times x."""
    return lambda params, record: jnp.sum(function(params["w"] * record["x"]))


def of_matrix(function):
    """A loss of a matrix that is well conditioned."""

    def loss(params, record):
        a, b = (params["w"] * record["x"])[:8].reshape(2, 4)
        matrix = 5 * jnp.eye(4) + jnp.outer(a, b) + jnp.outer(b, a)
        return sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(function(matrix)))

    return loss


def of_key(function):
    """A loss with a random draw of the record's own key, under threefry."""

    def loss(params, record):
        key, _ = jax.random.split(jax.random.fold_in(record["key"], record["label"]))
        return jnp.sum(params["w"] * record["x"] * function(key, 1 + params["w"]))

    return loss


def of_module(module, make_input, **options):
    """A loss of a Flax module and its parameters."""

    def loss(params, record):
        return jnp.mean(module.apply(params, make_input(record), **options).astype(jnp.float32) ** 2)

    return loss, module.init(KEY, make_input(one(vectors())), **options)


def of_nnx(make):
    graph, params = nnx.split(make(nnx.Rngs(0)))
    return lambda params, record: jnp.sum(nnx.merge(graph, params)(sequence(record))), params


def of_fields(params, record):
    inputs = record["bytes"] / jnp.float32(255) + record["low"].astype(jnp.float32)
    return jnp.where(record["flag"], params["w"] @ inputs, jnp.sum(params["w"]))


def classification(params, record):
    return optax.softmax_cross_entropy_with_integer_labels(params["w"] * record["x"], record["label"])


def sequence(record):
    return record["x"].reshape(3, 4)


def image(record):
    return record["x"].reshape(2, 2, 3)


def recurrent(params, record):
    def step(carry, x):
        return jnp.tanh(carry + x), carry

    last, _ = jax.lax.scan(step, 0.0, params["w"] * record["x"])
    return last


def halved_until_small(params, record):
    largest = jnp.max(jnp.abs(record["x"]))
    scale, _ = jax.lax.while_loop(lambda c: (c[1] > 0.1) & (c[1] < 1e9), lambda c: (c[0] / 2, c[1] / 2), (1.0, largest))
    return jax.lax.fori_loop(0, 3, lambda i, c: c * jnp.sin(i * 1.0 + c), params["w"] * record["x"] * scale).sum()


def branches(params, record):
    x = params["w"] * record["x"]
    chosen = jax.lax.cond(record["x"][0] > 0, jnp.sum, jnp.max, x)
    return chosen + jax.lax.switch(record["label"], [jnp.sum, jnp.min, lambda a: jnp.sum(a**2)], x)


def indexed(x):
    at = jnp.array([0, 1, 1])
    moved = x.at[at].add(x[:3]).at[4].set(2.0).at[5].multiply(3.0).at[6].min(0.1)
    return moved + jax.ops.segment_sum(x, jnp.arange(WIDTH) // 3, WIDTH) + x[jnp.argsort(x)]


def remembered(x):
    policy = jax.checkpoint_policies.save_only_these_names("kept")
    return jax.checkpoint(lambda a: jnp.sin(checkpoint_name(jnp.sin(a), "kept")), policy=policy)(jax.remat(jnp.sin)(x))


def linear_solve(a):
    return jax.lax.custom_linear_solve(lambda x: a @ x, a[0], lambda _, b: jnp.linalg.solve(a, b), symmetric=True)


def special(x):
    functions = jax.scipy.special
    positive = 1 + x**2
    return functions.gammainc(positive, 2.0) + functions.zeta(1 + positive, 2.0) + functions.i0(x) + jnp.sinc(x)


def on_a_mesh(x):
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


@jax.custom_vjp
def reversed_gradient(x):
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_jvp
def softened(x):
    return jnp.maximum(x, 0)


softened.defjvp(lambda primals, tangents: (softened(*primals), tangents[0] * jax.nn.sigmoid(primals[0])))

PLAIN = {
    "bytes, flags, bfloat16": of_fields,
    "classification": classification,
    "optax": of_vector(lambda x: optax.huber_loss(x) + optax.safe_norm(x, 1e-3) + optax.sigmoid_focal_loss(x, 1.0)),
    "activations": of_vector(lambda x: jax.nn.relu(x) + jax.nn.gelu(x) + jax.nn.log_softmax(x) + jax.nn.glu(x).sum()),
    "custom_vjp": of_vector(reversed_gradient),
    "custom_jvp": of_vector(softened),
    "checkpoint": of_vector(remembered),
    "scan": recurrent,
    "while": halved_until_small,
    "cond": branches,
    "map": of_vector(lambda x: jax.lax.map(jnp.sin, x) + jax.lax.associative_scan(jnp.multiply, x)),
    "scatter": of_vector(indexed),
    "sort": of_vector(lambda x: jnp.sort(x) + jax.lax.top_k(x, 2)[0].sum() + jnp.median(x) + jnp.quantile(x, 0.3)),
    "cumulative": of_vector(lambda x: jnp.cumsum(x) + jnp.cumprod(x) + jax.lax.cummax(x)),
    "fft": of_vector(lambda x: jnp.abs(jnp.fft.rfft(x)) ** 2),
    "special": of_vector(special),
    "barrier": of_vector(jax.lax.optimization_barrier),
    "a derivative inside": of_vector(lambda x: jax.hessian(lambda a: jnp.sum(jnp.sin(a) ** 3))(x)),
    "einsum": of_matrix(lambda a: jnp.einsum("ij,jk,ki->i", a, a, a)),
    "cholesky": of_matrix(jnp.linalg.cholesky),
    "solve": of_matrix(lambda a: jnp.linalg.solve(a, 1 + a[0])),
    "eigh": of_matrix(lambda a: jnp.linalg.eigh(a)[0]),
    "qr": of_matrix(lambda a: jnp.linalg.qr(a)[1]),
    "svd": of_matrix(lambda a: jnp.linalg.svd(a, compute_uv=False)),
    "determinant": of_matrix(jnp.linalg.slogdet),
    "conjugate gradients": of_matrix(lambda a: jax.scipy.sparse.linalg.cg(a, 1 + a[0])[0]),
    "custom_linear_solve": of_matrix(linear_solve),
    "resize": of_matrix(lambda a: jax.image.resize(a, (8, 8), "bilinear")),
    "normal": of_key(lambda key, w: jax.random.normal(key, (WIDTH,))),
    "bernoulli": of_key(lambda key, w: jax.random.bernoulli(key, 0.3, (WIDTH,))),
    "permutation": of_key(jax.random.permutation),
    "gamma": of_key(jax.random.gamma),
    "poisson": of_key(lambda key, w: jax.random.poisson(key, 3.0, (WIDTH,))),
    "an old key": of_key(lambda key, w: jax.random.normal(jax.random.PRNGKey(1), (WIDTH,))),
    "key data": of_key(lambda key, w: jax.random.normal(jax.random.wrap_key_data(jax.random.key_data(key)), (WIDTH,))),
    "dropout": of_key(lambda key, w: nn.Dropout(0.5).apply({}, w, deterministic=False, rngs={"dropout": key})),
}
ORDINARY = {name: (loss, VECTOR) for name, loss in PLAIN.items()} | {
    "network": (lambda p, r: network_loss(p, {"x": r["x"][:3], "y": r["x"][:2]}), network(KEY)[0]),
    "Dense": of_module(nn.Dense(3), lambda r: r["x"]),
    "Dense in bfloat16": of_module(nn.Dense(3, dtype=jnp.bfloat16), lambda r: r["x"]),
    "Conv": of_module(nn.Sequential([nn.Conv(4, (2, 2)), lambda x: nn.max_pool(x, (2, 2))]), image),
    "Embed": of_module(nn.Embed(7, 4), lambda r: r["label"]),
    "LayerNorm": of_module(nn.LayerNorm(), sequence),
    "GroupNorm": of_module(nn.GroupNorm(num_groups=2), sequence),
    "attention": of_module(nn.MultiHeadDotProductAttention(num_heads=2, deterministic=True), sequence),
    "LSTM": of_module(nn.RNN(nn.OptimizedLSTMCell(4)), sequence),
    "nnx layers": of_nnx(
        lambda rngs: nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.gelu, nnx.LayerNorm(4, rngs=rngs))
    ),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_loss_is_accepted(name):
    loss, params = ORDINARY[name]
    check(loss, params, vectors())


def test_a_constraint_on_a_mesh_is_accepted():
    check(of_vector(on_a_mesh), VECTOR, vectors())


OTHERS = {
    "NaN": lambda x: jnp.full_like(x, jnp.nan),
    "inf": lambda x: jnp.full_like(x, jnp.inf),
    "huge": lambda x: 1e30 * x,
    "zero": jnp.zeros_like,
}


def last_gradients(loss, params, records):
    """The gradient of the last record beside others that hold ordinary values, and anything else."""
    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    others = vectors(jax.random.key(4))
    swapped = jax.tree.map(lambda a, b: jnp.concatenate([a[:-1], b[-1:]]), others, records)
    found = [gradients(params, records), gradients(params, swapped)]
    for change in OTHERS.values():
        x = jnp.concatenate([change(records["x"][:-1]), records["x"][-1:]])
        found.append(gradients(params, records | {"x": x}))
    return [np.concatenate([np.ravel(x[-1]) for x in jax.tree.leaves(g)]).view(np.uint32) for g in found]


@pytest.mark.parametrize(
    "name", ["while", "cond", "special", "eigh", "conjugate gradients", "gamma", "dropout", "LSTM"]
)
def test_an_ordinary_record_does_not_feel_the_others(name):
    loss, params = ORDINARY[name]
    first, *rest = last_gradients(loss, params, vectors())
    assert np.any(first.view(np.float32) != 0)
    for gradient in rest:
        np.testing.assert_array_equal(gradient, first)


# --- losses that mix records ---


@jax.custom_batching.custom_vmap
def mixed(x):
    return x


@mixed.def_vmap
def _(axis_size, in_batched, x):
    return jnp.broadcast_to(jnp.sum(x, axis=0), x.shape), True


@jax.custom_vjp
def mixed_backward(x):
    return x


mixed_backward.defvjp(lambda x: (x, None), lambda _, g: (mixed(g),))


@jax.custom_vjp
def mixed_forward(x):
    return x


mixed_forward.defvjp(lambda x: (mixed(x), None), lambda _, g: (g,))


@jax.custom_jvp
def mixed_tangent(x):
    return x


@mixed_tangent.defjvp
def _(primals, tangents):
    return primals[0], jax.custom_derivatives.linear_call(lambda _, t: t, lambda _, t: t, (), tangents[0])


@jax.custom_jvp
def random_tangent(x):
    return x


@random_tangent.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] * drawn_under("rbg")(jax.random.key(0), None)


@jax.custom_vjp
def collective_backward(x):
    return x


collective_backward.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, "data"),))


def drawn_under(impl):
    """A draw whose key is made of the record."""

    def draw(key, _):
        words = jax.random.key_data(key).ravel()[0] + jnp.zeros(4, jnp.uint32)
        return jax.random.normal(jax.random.wrap_key_data(words, impl=impl), (WIDTH,))

    return draw


def raw_bits(key, _):
    state = jnp.tile(jax.random.key_data(key), 2)
    return jax.lax.rng_bit_generator(state, (WIDTH,), jnp.uint32)[1].astype(jnp.float32)


def incomplete_beta(x):
    """Its continued fraction goes on for all records until the slowest has converged."""
    shape = 0.1 + 1e3 * jax.lax.stop_gradient(x) ** 2
    return jax.scipy.special.betainc(shape, shape, jax.nn.sigmoid(x)) ** 2


@custom_partitioning
def partitioned(x):
    return x


partitioned.def_partition(
    partition=lambda mesh, arguments, result: (mesh, lambda x: x, result[0].sharding, (result[0].sharding,)),
    infer_sharding_from_operands=lambda mesh, arguments, result: arguments[0].sharding,
    sharding_rule="i -> i",
)


def called_back(x):
    return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x)) * x


def foreign(x):
    call = jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    return call(jax.lax.stop_gradient(x)) * x


def kernel(x):
    def copy(source, target):
        target[...] = source[...]

    call = pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)
    return call(jax.lax.stop_gradient(x)) * x


def sharded(x):
    mesh = jax.make_mesh((1,), ("model",))
    return jax.shard_map(lambda a: a, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())(x)


def with_a_reference(x):
    reference = jax.new_ref(x)
    reference[0] = 2.0
    return reference[...]


def printed(x):
    jax.debug.print("{}", x)
    return x


UNKNOWN = jax.extend.core.Primitive("of_somebody_else")
UNKNOWN.def_abstract_eval(lambda x: x)

MIXED = {
    "custom_vmap": (of_vector(lambda x: x * mixed(jax.lax.stop_gradient(x))), "custom_vmap_call"),
    "custom_vmap under jit, scan and cond": (
        of_vector(lambda x: jax.lax.map(lambda a: jax.lax.cond(a > 0, jax.jit(mixed), jnp.sin, a), x)),
        "custom_vmap_call",
    ),
    "sequential_vmap": (of_vector(jax.custom_batching.sequential_vmap(jnp.sin)), "custom_vmap_call"),
    "custom_vmap in a backward rule": (of_vector(lambda x: mixed_backward(x) ** 2), "custom_vmap_call"),
    "custom_vmap in a forward rule": (of_vector(mixed_forward), "custom_vmap_call"),
    "linear_call in a tangent rule": (of_vector(mixed_tangent), "linear_call"),
    "rbg in a tangent rule": (of_vector(random_tangent), "key<rbg>"),
    "collective in a backward rule": (of_vector(collective_backward), "data"),
    "rbg": (of_key(drawn_under("rbg")), "key<rbg>"),
    "unsafe_rbg": (of_key(drawn_under("unsafe_rbg")), "key<urbg>"),
    "raw bits": (of_key(raw_bits), "rng_bit_generator"),
    "rng_uniform": (of_vector(lambda x: x * jax.lax.rng_uniform(0.0, 1.0, (WIDTH,))), "rng_uniform"),
    "incomplete beta": (of_vector(incomplete_beta), "regularized_incomplete_beta"),
    "custom_partitioning": (of_vector(lambda x: x + partitioned(jax.lax.stop_gradient(x))), "custom_partitioning"),
    "callback": (of_vector(called_back), "pure_callback"),
    "print": (of_vector(printed), "debug_print"),
    "foreign function": (of_vector(foreign), "ffi_call"),
    "kernel": (of_vector(kernel), "pallas_call"),
    "shard_map": (of_vector(sharded), "shard_map"),
    "reference": (of_vector(with_a_reference), "new_ref"),
    "unknown": (of_vector(lambda x: x * UNKNOWN.bind(jax.lax.stop_gradient(x))), "of_somebody_else"),
    "collective": (of_vector(lambda x: jax.lax.psum(x, "data")), "data"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_may_mix_records_is_refused(name):
    loss, found = MIXED[name]
    with pytest.raises(ValueError, match=f"pure function of one record.*{found}"):
        check(loss, VECTOR, vectors())


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_a_key_that_is_not_threefry_is_refused_wherever_it_comes_from(impl):
    """As a field of a record, used or not, as a constant and as the default of keys that the loss makes."""
    closed_over = jax.random.key(0, impl=impl)

    def drawn(params, record):
        return jnp.sum(params["w"] * record["x"] * jax.random.normal(record["key"], (WIDTH,)))

    def constant(params, record):
        return jnp.sum(params["w"] * jax.random.normal(jax.random.fold_in(closed_over, record["label"]), (WIDTH,)))

    made = of_key(lambda key, w: jax.random.normal(jax.random.key(jax.random.bits(key)), (WIDTH,)))
    fields = vectors() | {"key": jax.random.split(closed_over, 4)}
    name = str(closed_over.dtype)
    for loss, records in ((drawn, fields), (PLAIN["scan"], fields), (constant, vectors())):
        with pytest.raises(ValueError, match=name):
            check(loss, VECTOR, records)
    check(made, VECTOR, vectors())
    with jax.default_prng_impl(impl), pytest.raises(ValueError, match=name):
        check(made, VECTOR, vectors())  # though an equal loss was accepted before


@pytest.mark.parametrize(
    "name", ["custom_vmap", "custom_vmap in a backward rule", "rbg", "raw bits", "incomplete beta"]
)
def test_what_is_refused_does_mix_records(name):
    """So the oracle has the power to tell."""
    first, *rest = last_gradients(MIXED[name][0], VECTOR, vectors())
    assert any(np.any(first != gradient) for gradient in rest)


@pytest.mark.parametrize("name", ["custom_vmap", "custom_vmap in a backward rule", "unsafe_rbg", "incomplete beta"])
def test_a_release_of_a_loss_that_mixes_records_is_refused(name, monkeypatch):
    """Before the private pass, and in each mode."""

    def never(*args, **kwargs):
        raise AssertionError("private data was read")

    def loss(params, record):
        mixing = MIXED[name][0](params, record)
        return (mixing - record["y"]) ** 2 / 2

    def records(key):
        x = jax.random.normal(key, (40, WIDTH))
        return {"x": x, "label": jnp.arange(40), "y": x[:, 0], "key": jax.random.split(key, 40)}

    data = {"public": records(KEY), "private": records(jax.random.key(4))}
    monkeypatch.setattr("qexp_jax.fine_tuning.one_pass.exact_sum", never)
    for mode in ("reverse", "forward"):
        with pytest.raises(ValueError, match="isolated"):
            fine_tune(KEY, loss, VECTOR, mode=mode, **data, **BUDGET)


def test_the_mean_loss_of_a_unit_is_checked_as_that_of_a_record():
    records, mask = record_trees.group_by_unit(
        jax.tree.map(np.asarray, {"x": np.ones((4, 3)), "y": np.ones(4)}), [0, 1, 0, 1]
    )
    params = {"w": jnp.ones(3)}
    check(record_trees.unit_loss(regression_loss), params, (records, mask))
    with pytest.raises(ValueError, match="psum|data"):
        check(record_trees.unit_loss(lambda p, r: jax.lax.psum(regression_loss(p, r), "data")), params, (records, mask))


REFUSED = """
    after_all all_gather all_to_all axis_index create_token get pmax pmin ppermute psum ragged_all_to_all
    regularized_incomplete_beta rng_bit_generator rng_uniform swap
""".split()


def test_each_public_primitive_is_sorted():
    """A new one of a later JAX is refused until somebody has looked at it."""
    public = {getattr(primitives, name).name for name in dir(primitives) if name.endswith("_p")}
    assert public - isolation._ROW_BY_ROW == set(REFUSED)


# --- losses that read a changing state ---


def drifting(make):
    """A loss that multiplies by one number more at each trace, as `make` holds it."""
    state = []

    def loss(params, record):
        state.append(None)
        return jnp.sum(make(params["w"] * record["x"], np.float32(len(state))))

    return loss


def by_a_nested_constant(x, value):
    constant = np.full(WIDTH, value)
    return jax.jit(lambda a: a * constant)(x)


def by_a_key(x, value):
    key = jax.random.key(int(value))
    return x * jax.random.normal(key, x.shape)


@jax.custom_vjp
def drifting_backward(x):
    return x


TRACES = []


def _drift(_, g):
    TRACES.append(None)
    return (g * len(TRACES),)


drifting_backward.defvjp(lambda x: (x, None), _drift)

CHANGING = {
    "literal": drifting(lambda x, value: x * float(value)),
    "a small change": drifting(lambda x, value: x * float(1 + 1e-6 * value)),
    "constant": drifting(lambda x, value: x * np.full(WIDTH, value)),
    "constant in a function that is called": drifting(by_a_nested_constant),
    "key": drifting(by_a_key),
    "backward rule": of_vector(drifting_backward),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_changing_state_is_refused(name):
    with pytest.raises(ValueError, match="changing state"):
        check(CHANGING[name], VECTOR, vectors())


def test_a_kept_tracer_is_refused():
    kept = []

    def loss(params, record):
        kept.append(jnp.sum(params["w"] * record["x"]))
        return 2 * kept[0] + kept[-1]

    with pytest.raises(ValueError, match="isolated.*Tracer"):
        check(loss, VECTOR, vectors())


DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("move", [np.asarray, jnp.asarray], ids=["on the host", "on the device"])
def test_a_constant_may_be_nan_in_any_precision(dtype, move):
    table = np.asarray(jnp.array([jnp.nan, -0.0, 1.0] * 4, dtype))

    def loss(params, record):
        constant = jnp.asarray(move(table.copy())).astype(jnp.float32)
        return jnp.sum(jnp.where(jnp.isnan(constant), 0.0, constant) * params["w"] * record["x"])

    check(loss, VECTOR, vectors())


def test_a_constant_may_be_a_key():
    key, several = jax.random.key(1), jax.random.split(KEY, WIDTH)

    def loss(params, record):
        noise = jax.random.normal(key, (WIDTH,)) + jax.vmap(jax.random.uniform)(several)
        return jnp.sum(params["w"] * record["x"] * noise)

    check(loss, VECTOR, vectors())
    data = regression()
    release = fine_tune(
        KEY, lambda p, r: regression_loss(p, r) * jax.random.uniform(key), {"w": jnp.ones(3)}, **data, **BUDGET
    )  # fmt: skip
    assert np.all(np.isfinite(release.params["w"]))


def test_a_constant_of_both_traces_is_not_copied(monkeypatch):
    """A frozen model inside a loss can be larger than a host's memory."""
    table = jnp.ones((WIDTH, WIDTH))

    def never(x):
        assert np.size(x) <= 1
        return np.asarray(x)

    monkeypatch.setattr(isolation, "_on_host", never)
    check(lambda p, r: jnp.sum(table @ (p["w"] * r["x"])), VECTOR, vectors())


# --- what a loss returns ---


def value(params, record):
    return jnp.sum(params["w"] * record["x"])


CONSTANT = jnp.float32(1.25) + 0


RETURNED = {
    "auxiliary": (lambda p, r: (value(p, r), {}), r"PyTreeDef\(\(\*, \{\}\)\) of \['float32\[\]'\]"),
    "pair": (lambda p, r: (value(p, r), p["w"]), r"\['float32\[\]', 'float32\[12\]'\]"),
    "dict": (lambda p, r: {"loss": value(p, r)}, r"\{'loss': \*\}"),
    "nothing": (lambda p, r: None, r"PyTreeDef\(None\) of \[\]"),
    "a Python float": (lambda p, r: 1.25, "found float, which does not depend on the parameters"),
    "a Python integer": (lambda p, r: 7, "found int, which does not depend on the parameters"),
    "a NumPy float": (lambda p, r: np.float32(1.25), r"found float32\[\], which does not depend on the parameters"),
    "a constant": (lambda p, r: CONSTANT, r"found float32\[\], which"),
    "text": (lambda p, r: "secret", "found str"),
    "an integer": (lambda p, r: value(p, r).astype(int), r"found int32\[\]"),
    "a flag": (lambda p, r: value(p, r) > 0, r"found bool\[\]"),
    "complex": (lambda p, r: value(p, r) * 1j, r"found complex64\[\]"),
    "one number": (lambda p, r: value(p, r)[None], r"found float32\[1\]"),
    "a vector": (lambda p, r: p["w"] * r["x"], r"found float32\[12\]"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_anything_but_a_scalar_is_named(name):
    loss, found = RETURNED[name]
    with pytest.raises(ValueError, match=f"one floating-point scalar, .*{found}") as caught:
        check(loss, VECTOR, vectors())
    data = {"public": vectors(), "private": vectors(jax.random.key(4))}
    assert "1.25" not in str(caught.value) and "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="one floating-point scalar"):
        fine_tune(KEY, loss, VECTOR, **data, **BUDGET)


def test_a_scalar_of_low_precision_is_accepted():
    for dtype in (jnp.float16, jnp.bfloat16):
        check(lambda p, r, dtype=dtype: value(p, r).astype(dtype), VECTOR, vectors())


def test_checks_hold_under_strict_promotion():
    strict = {name: item for name, item in ORDINARY.items() if name in ("scan", "Dense", "network")}
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for loss, params in strict.values():
            check(loss, params, vectors())
            validation.check_finite("pretrained parameters", params)
            validation.check_finite("public records", vectors()["x"])
        with pytest.raises(ValueError, match="custom_vmap_call"):
            check(MIXED["custom_vmap in a backward rule"][0], VECTOR, vectors())
