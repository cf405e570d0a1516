"""Numbers only: what a release promises, what many of them spend, and how a certificate is derived again.

Nothing here imports a model: a certificate can be verified where none is installed.
"""

from qexp_jax.privacy.accounting import (
    DELTA_RANGE,
    EPSILON_RANGE,
    check_budget,
    check_epsilon,
    compose,
    delta_from_mu,
    delta_from_rho,
    dp_event,
    epsilon_from_mu,
    epsilon_from_rho,
    mu_from_budget,
    mu_from_noise,
    noise_multiplier,
    rho_from_budget,
    sensitivity,
    zcdp_event,
    zcdp_rho,
)

__all__ = [
    "DELTA_RANGE",
    "EPSILON_RANGE",
    "check_budget",
    "check_epsilon",
    "compose",
    "delta_from_mu",
    "delta_from_rho",
    "dp_event",
    "epsilon_from_mu",
    "epsilon_from_rho",
    "mu_from_budget",
    "mu_from_noise",
    "noise_multiplier",
    "rho_from_budget",
    "sensitivity",
    "zcdp_event",
    "zcdp_rho",
]
