"""Attained against claimed privacy, in three ways, from knowing everything to knowing one release.

    worst_neighbour    the exact curve of the pair of neighbours that moves the sum most
    falsify            what many outputs of a mechanism prove, whatever it computes
    one_run_epsilon    what one release with many canaries proves

An audit's output is **not private**: run it on data made for it.
"""

from qexp_jax.audit.black_box import LowerBound, Mechanism, epsilon_bound, falsify, least_draws, mu_bound
from qexp_jax.audit.exact import WorstNeighbour, attained_delta, attained_mu, worst_neighbour
from qexp_jax.audit.one_run import make_canaries, one_run_epsilon

__all__ = [
    "LowerBound",
    "Mechanism",
    "WorstNeighbour",
    "attained_delta",
    "attained_mu",
    "epsilon_bound",
    "falsify",
    "least_draws",
    "make_canaries",
    "mu_bound",
    "one_run_epsilon",
    "worst_neighbour",
]
