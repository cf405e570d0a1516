"""Checks of public input: what is not finite is found, and where."""

import jax.numpy as jnp
import numpy as np
import pytest

from qexp_jax.data import validation


@pytest.mark.parametrize("move", [np.asarray, jnp.asarray], ids=["on the host", "on the device"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_found_wherever_the_public_records_lie(move, bad):
    x = np.full((4, 3), 3e38, np.float32)  # their sum overflows, and tells nothing
    public = {"x": move(x), "label": move(np.arange(4)), "y": move(np.ones(4, np.float32))}
    validation.check_finite("public records", public)
    x = x.copy()
    x[2, 1] = bad
    with pytest.raises(ValueError, match=r"found (nan|-?inf) in leaf \['x'\] of shape \(4, 3\)"):
        validation.check_finite("public records", public | {"x": move(x)})


def test_a_float64_that_float32_cannot_hold_is_not_finite():
    validation.check_finite("public records", np.array([1e30]))
    with pytest.raises(ValueError, match="Expected finite"):
        validation.check_finite("public records", np.array([1e300]))
