import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax import records


def test_padding_is_masked_and_keeps_order():
    padded, mask = records.pad({"x": jnp.arange(5.0)}, 4)
    assert padded["x"].shape == (8,) and mask.sum() == 5
    np.testing.assert_array_equal(padded["x"][:5], jnp.arange(5.0))


def test_no_records_pad_to_one_masked_batch():
    batches, mask = records.microbatches({"x": jnp.zeros((0, 3))}, 2)
    assert batches["x"].shape == (1, 2, 3) and not mask.any()


def test_unit_loss_is_the_mean_over_the_units_records():
    data, ids = {"x": jnp.arange(6.0)}, ["b", "a", "b", "c", "b", "a"]
    unit, mask = records.group_by_unit(data, ids)
    loss = records.unit_loss(lambda p, r: p * r["x"])
    means = jax.vmap(lambda u, m: loss(2.0, (u, m)))(unit, mask)
    np.testing.assert_allclose(means, 2 * np.array([3.0, 2.0, 3.0]))  # a, b, c


def test_a_cap_keeps_the_first_records_of_a_unit():
    unit, mask = records.group_by_unit({"x": jnp.arange(4.0)}, [7, 7, 7, 1], max_records_per_unit=2)
    np.testing.assert_array_equal(unit["x"], [[3.0, 3.0], [0.0, 1.0]])
    np.testing.assert_array_equal(mask, [[True, False], [True, True]])


@pytest.mark.parametrize("index", [slice(1, 3), np.array([2, 0]), jnp.array([2, 0])])
def test_of_numpy_records_only_those_taken_go_to_the_device(index, monkeypatch):
    data = {"x": np.arange(12.0, dtype=np.float32).reshape(4, 3)}
    expected, moved = data["x"][np.arange(4)[index]], []
    as_array = jnp.asarray
    monkeypatch.setattr(jnp, "asarray", lambda x, *args: moved.append(np.shape(x)) or as_array(x, *args))
    np.testing.assert_array_equal(records.take(data, index)["x"], expected)
    assert moved == [(2, 3)]
    np.testing.assert_array_equal(jax.jit(records.take)(data, np.arange(4)[index])["x"], expected)


def test_equal_losses_share_one_unit_loss():
    def loss(params, record):
        return params

    assert records.unit_loss(loss) is records.unit_loss(loss)


@pytest.mark.parametrize("bad", [{}, {"x": np.zeros(())}, {"x": np.zeros(3), "y": np.zeros(4)}])
def test_records_without_one_leading_axis_are_refused(bad):
    with pytest.raises(ValueError, match="one common leading axis"):
        records.num_records(bad)


@pytest.mark.parametrize(
    ("n", "most", "shape"),
    [(9, 8, (2, 8)), (64, 32, (2, 32)), (33, 32, (2, 24)), (5, 8, (1, 5)), (400, 32, (13, 32)), (9, 5, (2, 5))],
)
def test_microbatches_are_few_and_of_even_size_in_eights(n, most, shape):
    batches, mask = records.microbatches({"x": jnp.arange(n)}, most)
    assert batches["x"].shape == mask.shape == shape
    np.testing.assert_array_equal(batches["x"][mask], jnp.arange(n))
