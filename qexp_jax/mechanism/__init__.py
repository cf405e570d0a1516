"""The draws: Gaussian, exact and closed-form; of integers; of pure epsilon; restricted to a ball."""

from qexp_jax.mechanism.gaussian import (
    Quadratic,
    draw,
    draws,
    excess_utility,
    inverse_temperature,
    log_density,
    minimiser,
    noisy_sum,
    noisy_whitened_sum,
    protecting_key,
    release_step,
    utility,
)

__all__ = [
    "Quadratic",
    "draw",
    "draws",
    "excess_utility",
    "inverse_temperature",
    "log_density",
    "minimiser",
    "noisy_sum",
    "noisy_whitened_sum",
    "protecting_key",
    "release_step",
    "utility",
]
