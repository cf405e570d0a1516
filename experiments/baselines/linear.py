"""Baselines for linear heads: objective perturbation and DP least squares (AdaSSP), both around the pretrained head.

Rows are `x~ = (x, 1)` scaled to norm at most R. The head's logits are `x~ (theta0 + w)`, and w is what is learnt. Both
guarantees are for zero-out (REPLACE_SPECIAL) or add/remove one record.

**Objective perturbation** (Chaudhuri et al., arXiv:0912.0071; Kifer et al., COLT 2012) releases the exact minimiser of

    sum_i loss_i(theta0 + w) + lambda/2 |w|^2 + <b, w>,     b ~ N(0, sigma^2 I).

*Its calibration here* (for one logit that of Redberg, Koskela and Wang, arXiv:2401.00583; derived for K logits below).
With w released, b = -grad(w) - lambda w, so the density of w is phi_sigma(b) |det(Hess(w) + lambda I)|. Dropping one
record changes b by its gradient s (x) x~, where s in R^m has |s| <= G/R, and divides the determinant by at most
(1 + c/(m lambda))^m, where c bounds the trace of the record's Hessian and m its rank: for one logit m = 1, G = R,
c = R^2/4; for K logits of a softmax m = K - 1, G = sqrt(2) R, c = R^2 (1 - 1/K). The log-ratio of densities is thus at
most `m log(1 + c/(m lambda)) + mu chi + mu^2/2`, where mu = G/sigma and chi, the norm of the m coordinates of b/sigma
along x~ in the span of s, is chi_m distributed under w's own law. Hence, for either direction,

    delta <= E max(0, 1 - exp(epsilon - m log(1 + c/(m lambda)) - mu chi - mu^2/2)).

**AdaSSP** (Wang, arXiv:1803.02596), in its Gaussian form: ridge regression of the residuals of the pretrained head on
noisy sufficient statistics, its ridge set from a noisy smallest eigenvalue; mu is split evenly over three releases.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq, minimize
from scipy.special import expit, log_softmax, softmax
from scipy.stats import chi, norm

from experiments.data.splits import Records
from qexp_jax import privacy

_FAILURE = 0.05  # AdaSSP's probability that its ridge is too small


class Head(NamedTuple):
    """Private rows around a pretrained head: rows (n, p + 1), labels (n,), theta0 (p + 1, K)."""

    rows: np.ndarray
    labels: np.ndarray
    theta0: np.ndarray


def head_of(params: Any, private: Records, norm_bound: float) -> Head:
    """The rows, with norm at most `norm_bound`, and the weights of a model that is one dense layer."""
    kernel, bias = params["params"]["head"]["kernel"], params["params"]["head"]["bias"]
    x = private["x"].reshape(len(private["label"]), -1).astype(np.float64)
    rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    rows *= np.minimum(1, norm_bound / np.linalg.norm(rows, axis=1, keepdims=True))
    return Head(rows, private["label"], np.concatenate([kernel, np.asarray(bias)[None]]).astype(np.float64))


def moved(params: Any, w: np.ndarray) -> Any:
    """The parameters at theta0 + w."""
    head = params["params"]["head"]
    update = {"kernel": head["kernel"] + w[:-1].astype(np.float32), "bias": head["bias"] + w[-1].astype(np.float32)}
    return {"params": params["params"] | {"head": jax.tree.map(np.asarray, update)}}


def objective_perturbation(
    rng: np.random.Generator,
    params: Any,
    private: Records,
    *,
    norm_bound: float,
    regularisation: float,
    epsilon: float,
    delta: float,
) -> tuple[Any, int]:
    """One (epsilon, delta)-DP minimiser of the perturbed logistic loss, and the number of passes that it took.

    Args:
      rng: secret randomness.
      params: pretrained, public.
      private: records.
      norm_bound: R.
      regularisation: lambda, see `least_regularisation`.
      epsilon: > 0.
      delta: in (0, 1).
    """
    head = head_of(params, private, norm_bound)
    outputs = head.theta0.shape[1]
    mu = gradient_mu(outputs, norm_bound, regularisation, epsilon, delta)
    scale = norm_bound * (1 if outputs == 1 else math.sqrt(2)) / mu
    linear = scale * rng.standard_normal(head.theta0.shape)

    def objective(flat):
        w = flat.reshape(head.theta0.shape)
        loss, residuals = _loss_and_residuals(head.rows @ (head.theta0 + w), head.labels)
        value = loss + regularisation / 2 * np.sum(w**2) + np.sum(linear * w)
        return value, (head.rows.T @ residuals + regularisation * w + linear).ravel()

    size = head.theta0.size
    result = minimize(
        objective, np.zeros(size), jac=True, method="L-BFGS-B", options={"gtol": 1e-7, "ftol": 0, "maxiter": 2000}
    )
    return moved(params, result.x.reshape(head.theta0.shape)), int(result.nfev)


def _loss_and_residuals(logits, labels):
    """Summed loss and its gradient by the logits (n, K)."""
    if logits.shape[1] == 1:
        z = logits[:, 0]
        return np.sum(np.logaddexp(0, z) - labels * z), (expit(z) - labels)[:, None]
    one_hot = np.eye(logits.shape[1])[labels]
    return -np.sum(one_hot * log_softmax(logits, axis=1)), softmax(logits, axis=1) - one_hot


def determinant_share(outputs: int, norm_bound: float, regularisation: float) -> float:
    """What the change of the determinant takes of epsilon, m log(1 + c/(m lambda))."""
    rank = max(1, outputs - 1)
    trace = norm_bound**2 / 4 if outputs == 1 else norm_bound**2 * (1 - 1 / outputs)
    return rank * math.log1p(trace / (rank * regularisation))


def perturbation_delta(mu: float, outputs: int, epsilon: float) -> float:
    """The bound on delta above, with the determinant's share already taken from epsilon."""
    law, shift = chi(max(1, outputs - 1)), epsilon - mu**2 / 2
    start = max(0.0, shift / mu)
    value, _ = quad(lambda t: -math.expm1(shift - mu * t) * law.pdf(t), start, start + 40, epsabs=0, limit=200)
    return value


def gradient_mu(outputs: int, norm_bound: float, regularisation: float, epsilon: float, delta: float) -> float:
    """The largest mu = G/sigma that the bound allows; ValueError where the determinant leaves nothing."""
    left = epsilon - determinant_share(outputs, norm_bound, regularisation)
    if left <= 0:
        raise ValueError(f"{regularisation=} is too small for {epsilon=} at {norm_bound=}.")
    return brentq(
        lambda mu: math.log(perturbation_delta(mu, outputs, left) + 1e-300) - math.log(delta),
        1e-4,
        10 + math.sqrt(2 * left),
    )


def adassp(
    rng: np.random.Generator, params: Any, private: Records, *, norm_bound: float, step: float, mu: float
) -> Any:
    """Moves the head by `step` times AdaSSP's least squares fit to its residuals; mu-GDP.

    Args:
      rng: secret randomness.
      params: pretrained, public.
      private: records.
      norm_bound: R.
      step: from residuals of probabilities to logits, public.
      mu: budget, split evenly over the smallest eigenvalue, X^T X and X^T Y.
    """
    head = head_of(params, private, norm_bound)
    width, outputs = head.theta0.shape
    _, slopes = _loss_and_residuals(head.rows @ head.theta0, head.labels)
    sigma = math.sqrt(3) / mu
    gram = head.rows.T @ head.rows
    least = np.linalg.eigvalsh(gram)[0] + norm_bound**2 * sigma * (rng.standard_normal() - norm.isf(_FAILURE))
    upper = np.triu(rng.standard_normal((width, width)))
    noise = norm_bound**2 * sigma * (upper + np.triu(upper, 1).T)
    ridge = max(0.0, math.sqrt(width * math.log(2 * width**2 / _FAILURE)) * norm_bound**2 * sigma - max(0.0, least))
    bound = norm_bound * (1 if outputs == 1 else math.sqrt(2))
    cross = head.rows.T @ -slopes + bound * sigma * rng.standard_normal((width, outputs))
    return moved(params, step * np.linalg.solve(gram + noise + ridge * np.eye(width), cross))


def adassp_mu(epsilon: float, delta: float) -> float:
    """mu of a budget."""
    return privacy.mu_from_budget(epsilon, delta)
