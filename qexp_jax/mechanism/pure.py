"""Pure epsilon: two exponential mechanisms of the quadratic whose log-ratio is bounded.

The draw of `mechanism` is (epsilon, delta)-private for every delta > 0 but for no epsilon at delta = 0. Two that are,
with x = R^T w, S the clipped sum, N public, and Delta the sensitivity of S:

**K-norm gradient** (Reimherr and Awan, arXiv:1905.09436): density proportional to exp(-(epsilon/Delta) |N x + S|). The
norm moves by at most Delta between neighbours and the normaliser not at all. It is S plus noise of a uniform direction
and a Gamma(k, Delta/epsilon) length, on all of R^k.

**Ball**: density proportional to exp(beta U(w)) on |x| <= r, a Gaussian restricted to a ball (`truncated`). First S is
moved to the nearest point with |S| <= B, by default B = N C, which every sum of N clipped units meets; this moves
neighbours no further apart. With Z(s) the integral of exp(-beta (N |x|^2 / 2 + x.S)) over the ball at s = |S|,

    log p_S(x) / p_S'(x) = beta x.(S' - S) + log Z(s') - log Z(s),

and since log Z is convex and increasing in s, the supremum over all allowed neighbours and all x is

    epsilon = beta r Delta + log Z(B) - log Z(B - Delta),

reached where S' = S + Delta S/|S| is on the bound and x on the sphere, opposite to the change. It is a constant of
public numbers; the actual S does not enter. The textbook's beta = epsilon / (2 r Delta) bounds the second part by the
first; where the noise is small against the ball it is about beta Delta min(r, B/N), so that a radius above B/N, or a
sum bound below N r, allows up to twice the textbook's beta.

For real arithmetic, the ball draw is at the same time mu-GDP with mu = Delta sqrt(beta/N), that of the unrestricted
Gaussian of equal beta: a log-density that is N beta-strongly concave on a convex set, and whose difference between
neighbours is beta Delta-Lipschitz (Gopi, Lee and Liu, arXiv:2203.00263). The calibration is ours.

`tests/test_pure.py` holds both densities' log-ratios over neighbours against epsilon, which they reach, and the draws
against the densities. Both cost much more than the Gaussian draw once k is large: a pure guarantee has to hold where
nothing is ever drawn.
"""

from qexp_jax.mechanism.pure_ball import (
    Ball,
    ball_draw,
    ball_expected_excess,
    ball_log_density,
    calibrate_ball,
    exact_epsilon,
)
from qexp_jax.mechanism.pure_knorm import knorm_draw, knorm_excess_quantile, knorm_expected_excess, knorm_log_density

__all__ = [
    "Ball",
    "ball_draw",
    "ball_expected_excess",
    "ball_log_density",
    "calibrate_ball",
    "exact_epsilon",
    "knorm_draw",
    "knorm_excess_quantile",
    "knorm_expected_excess",
    "knorm_log_density",
]
