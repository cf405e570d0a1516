"""Every number that decides how a release moves a model. None is private, and none is tuned on private data.

What each is worth, and what else was tried, is in `experiments/ABLATIONS.md`. Numbers that decide only what something
costs or how finely it is computed (samples of public records, grids, batches) stand beside their code.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rule:
    """The constants of `weighting`, `plan`, `whitened`, `preconditioner`, `empirical_bayes`, `secants`, `step_size`.

    Attributes:
      tilt_share: of mu^2 that the draw of a tilt takes.
      least_signal: least N mu with which there is a tilt: below it noise hides common shifts.
      least_evidence: nats by which a shift must be more likely than none for weights to be accepted.
      least_sample: of the weights, effective sample size over the number of public records.
      least_temper: share of the tilting direction that must be left once the sample is that large.
      damping: lambda, in largest public curvatures.
      clip_quantile: of the public norms; C.
      noise_cost: rise of the public loss, in its root mean square, that the noise of all rounds may cause.
      rounds: T.
      sampling: variance of a private mean gradient over that of as many public ones: private records vary more.
      common_shift: up to this tau the prior is uniform in log tau, and falls as tau^-4 beyond.
      others_shift: tau outside of the leading directions, in their tau.
      curvature_ratio: private over public curvature along a released gradient, before any release: mean and standard
        deviation.
      heavy_shift: expected tau above which a shift is heavy.
      heavy_rounds: T under a heavy shift.
      heavy_longer: how many times as long steps may be there.
      heavy_clip: share of C at which units are clipped there.
      heavy_hold: rounds in a row that may hold all but the leading directions there.
    """

    tilt_share: float = 0.1
    least_signal: float = 200.0
    least_evidence: float = 3.0
    least_sample: float = 0.75
    least_temper: float = 0.45
    damping: float = 0.01
    clip_quantile: float = 0.95
    noise_cost: float = 0.1
    rounds: int = 12
    sampling: float = 1.5
    common_shift: float = 5e-3
    others_shift: float = 0.5
    curvature_ratio: float = 2.0
    heavy_shift: float = 0.02
    heavy_rounds: int = 80
    heavy_longer: float = 2.0
    heavy_clip: float = 0.7
    heavy_hold: int = 9


RULE = Rule()
