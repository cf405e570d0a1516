"""Differentially private fine-tuning by exact draws of an exponential mechanism with a quadratic utility.

`fine_tune` is the one call. What it does, on one page:

**Given** a model with pretrained parameters theta_0, public records, N private units (records, or persons with
several), and a budget (epsilon, delta), which is mu-Gaussian differential privacy (T1).

**Units.** With theta = theta_t + P w in a public subspace P, a unit's gradient is g_i, the mean over its records, and

    v_i = M^{-1/2} P^T g_i,        S = sum_i v_i min(1, C / |v_i|)                                         (1)

where the clipping metric M is public. Neighbours change S by at most Delta (C, or 2 C where one unit replaces another).
S is added in whole steps of a grid, so that (1) holds in float32 for whatever a record contains.

**Utility.** With g = M^{1/2} S / N and a public model of the curvature A, the quadratic model of the loss around
theta_t is q(w) = g . w + w . A w / 2. Its utility is minus the square of its gradient, and an exponential mechanism
with this utility is a multivariate normal:

    U(w) = -(N/2) |g + A w|^2 in the norm of M^{-1}                                                        (2)
    w = -A^{-1} M^{1/2} (S + C z xi) / N,        xi standard normal, mu = Delta / (C z)                    (3)

This is exact: no sampler has to converge. With A = M = H + lambda I, the damped public curvature, and one round it is
the mechanism of arXiv:2605.20521; with A = I / lr and M = I it is noisy gradient descent on all records.

**Tilt** (T9, before the rounds). One draw (3) of the mean of public features phi, with M = A = I, gives public records
the weights w_j proportional to exp(theta . phi_j); the model is trained on them, and they weight the public curvature.

**Rounds** t = 1, ..., T, each with mu / sqrt(T) (T6):

    draw      (3) with A = M = (H + lambda I)^{1/2}                                                        (4)
    follow    theta_{t+1} = theta_t + P F_t w                                                              (5)

where F_t, diagonal in public directions, replaces M^{-1} by the inverse curvature that all releases so far show. That
is post-processing of releases (T5), in one function, `one_round.follow`; all its numbers stand in `rule`.

**Theorems**, as they are numbered throughout, each stated where it is used:

    T1  a round is exactly mu-GDP                  `privacy`             tests/test_privacy.py, test_adversary.py
    T2  pure epsilon                               `pure`                tests/test_pure.py
    T3  what noise costs                           `accuracy`            tests/test_accuracy.py
    T4  the metric of clipping                     `plan`                tests/test_plan.py
    T5  post-processing is free, redraws are not   `step_size`           tests/test_flow.py, test_ledger.py
    T6  rounds compose                             `rounds`              tests/test_finetune.py
    T9  tilting public records                     `weighting`           tests/test_weighting.py, test_tilt.py

**Folders**, by what they may see; each imports only those above it:

    numerics      exact sums, rounding, keys
    data          records, units, streams
    privacy       numbers: accounting, ledger, certificates
    model         from a loss to gradients of single records in a subspace
    quadratic     public records and past releases only: metric, curvature, clip norm, features, weights, step sizes
    mechanism     the draws
    private_pass  the only computing on private values
    fine_tuning   the call
    audit         attained against claimed privacy
"""

from qexp_jax import audit, mechanism, privacy
from qexp_jax.data import records
from qexp_jax.data.dataset import Dataset
from qexp_jax.data.relation import NeighboringRelation
from qexp_jax.data.stream import Stream
from qexp_jax.fine_tuning import preflight, tilt
from qexp_jax.fine_tuning.checkpoint import Checkpoint
from qexp_jax.fine_tuning.finetune import Release, fine_tune
from qexp_jax.fine_tuning.one_round import RoundInfo
from qexp_jax.fine_tuning.options import PlanOptions, RunOptions
from qexp_jax.mechanism import hardened, pure, truncated
from qexp_jax.model import gradients, subspace
from qexp_jax.numerics import keys
from qexp_jax.numerics.keys import fresh_key
from qexp_jax.privacy import ledger, verification
from qexp_jax.privacy.ledger import BudgetExceeded, Ledger
from qexp_jax.privacy.report import report
from qexp_jax.privacy.verification import verify
from qexp_jax.private_pass import clipping
from qexp_jax.quadratic import accuracy, curvature, features, plan, precision, step_size, weighting

__version__ = "0.1.0"
__all__ = [
    "BudgetExceeded",
    "Checkpoint",
    "Dataset",
    "Ledger",
    "NeighboringRelation",
    "PlanOptions",
    "Release",
    "RoundInfo",
    "RunOptions",
    "Stream",
    "accuracy",
    "audit",
    "clipping",
    "curvature",
    "features",
    "fine_tune",
    "fresh_key",
    "gradients",
    "hardened",
    "keys",
    "ledger",
    "mechanism",
    "plan",
    "precision",
    "preflight",
    "privacy",
    "pure",
    "records",
    "report",
    "step_size",
    "subspace",
    "tilt",
    "truncated",
    "verification",
    "verify",
    "weighting",
]
