"""The public side of a release: precision, clip norm, length, rounds, from a survey of public records.

One rule, with nothing to tune on private data:

* *Precision*: M = (H + lambda I)^{1/2}, scaled to a largest eigenvalue of 1, with the surveyed curvature H. The
  exponent 1/2 lies between clipping in the parameter norm (0) and in the curvature norm (1): with 1 noise swamps the
  low curvatures, with 0 the high ones.
* *Clip norm*: of the .9, .95 and .98 quantiles of the public norms |M^{-1/2} g|, the one of least expected excess
  (`clip_norms`): the larger, the less noise the budget brings and the more clipping pulls at the public records. What
  it adds to their mean gradient is taken off every release (`clip_norms.pull`), which costs no budget. Under a heavy
  shift, where nothing is taken off, a share of it, the smaller the less pull and the more noise there is, until in the
  last quarter of the rounds it is whole again, which takes the pull back.
* *Length*: at most four times what makes the noise of all rounds together, added to the anchor, raise the *public* loss
  by a fixed small fraction of its root mean square; within that, what the releases deserve (`flow`). Where they show a
  heavy shift, whose loss is far above that of the anchor, at most eight times.
* *Geometry*: a round tunes all parameters or, with an infinite precision of all others, the leading directions alone.
  The others hold about half of a gradient's energy, and so of the clip norm, and most of the noise; without them a
  gradient's square over noise was found 1.6 to 3 times larger. Each round takes the geometry of least expected excess
  given the releases before it (`choose`): the leading directions where the shift seems small for the noise, all where
  there is more to gain. Under a heavy shift it is all, whatever is expected of the anchor's quadratic, for the public
  records' leading directions are not the private ones' there: with 700 of scikit-learn's digits, transposed, that took
  an MLP at epsilon 1 from .47 to .69, and with 500 of MNIST turned by 40 degrees from .44 to .49. But where noise hides
  what the others hold, so that no step of all is expected to lower the loss (`flow.best_step`), a round tunes the
  leading ones alone, unless no more than a fifth of the rounds so far tuned all, or none of the last nine: the others
  may emerge late, or again. With that, steps of the leading ones twice as long as those of all, and `flow.signal_left`
  without a bias under loud noise, MLPs that were fitted to their public records until little loss was left went, at
  epsilon 1 with 500 records, from an AUROC of .60 to .84 on a table with inverted labels, from .71 to .81 on one with
  six of 20 coefficients changed, and from an accuracy of .69 to .72 on scikit-learn's digits turned by 30 degrees; on
  PhysioNet by ICU with 2000 records the loss went from .46 to .45 with half the features moved by 1.5 and from .45 to
  .47 with inverted labels (four seeds each). Without the nine, noise kept two of ten MLPs on turned images (epsilon 1)
  in the leading directions to the end, at .77 in place of .82.
* *Rounds*: as many as keep each step of the length expected before the first within one over the largest private
  curvature expected, 8 to 12; where that would take more than 24, as many as keep it within two, up to 24. What the
  releases then deserve may be up to four times as long. Where they show a heavy shift, what is left of the budget is
  split over so many rounds that there are 80 in all: far from the anchor the curvature changes on the way. On MNIST
  turned by 40 degrees (shifts of .05 to .25 were found; more than .02 in one of the arena's 1,200 releases) the longer
  length and 40 rounds took an MLP at epsilon 1 from .79 to .82 with 4000 records and from .71 to .75 with 2000; 80 in
  place of 40, with 4000 records, added .004 (10 seeds) to it and .009 (4) at epsilon 8, and .007 to a CNN at epsilon 8,
  -.006 at epsilon 1 (3). 160 rounds, sixteen times the length, or a flatter precision were worse.

A round is then one exact draw with precision M, followed for a step of the flow.

What was measured and not kept (differences of AUROC or accuracy; two to ten seeds; *turned* is MNIST turned by 40
degrees, 4000 records):

* *Precision.* One draw with precision H + lambda I needs a damping near the largest curvature to be safe and then
  gains a fifth as much. M to the power of 1/4 or 0 lost .002 and .009 on turned images, 1/3 or 1/4 up to .004 in the
  arena and .02 to .04 on digits turned or transposed, and gained .004 to .011 on PhysioNet with features moved or
  turned. A CNN after long pretraining would want it flat (1000 records, epsilon .5): constant steps of the best length
  end at losses of .166, .165 and .164 with powers of 1/2, 1/4 and 0.
* *Clip norm.* Without a heavy shift, the .7 quantile lost .001 to .007 on MNIST by writers (linear, 1000 records). From
  longer pretraining (4000 records, epsilon 8) the .98, .9, .8 and .6 quantiles led to .893, .897, .892 and .889, and to
  test losses of .41, .42, .45 and .49. To take off the public mean of what clipping adds as it is, not shrunk by its
  sampling error, lowered the loss of an MLP on PhysioNet by .004 in place of .002, but on images that mean is mostly
  sampling error; twice the shrunken one lowered it by .004 as well, and PhysioNet's AUROC by .0002 (+- .0002). With the
  pull in `clip_norms.excess` counted less for it, the loss on PhysioNet rose. Under a heavy shift, a share of it to the
  last round classified as well, but cost PhysioNet, whose classes are unequal, .03 to .1 of loss; a quarter of it and
  80 equal steps reached .889 on turned images, with a test loss of .48 in place of .41 (DP-SGD with the settings of
  best accuracy .57). With linear models on changed PhysioNet (four seeds), norms above C to the end lost .02 of AUROC
  (twice C) to .09 (eight times). Twice C in the last quarter alone lowered the loss by .01 there, but in 19 cells of
  tables, digits, PhysioNet and turned images it lost .008 at epsilon 1, with a loss .014 higher; at epsilon 8 it
  changed them by .0000 and -.003 (four seeds).
* *Geometry.* One chosen once, from public numbers, lost .03 to .2 under a heavy shift. 8 or 32 leading directions
  beside 128 were never chosen, and biases or a last layer alone gained at most .0005; 32 or 64 in place of 128 lost
  .001 to .002 on PhysioNet, 192 or 256 lost .003. Under a heavy shift the better step alone, without looks at all, left
  turned images at epsilon 1 at .69 and .76 (others .82), for their first rounds showed nothing in the others; to tune
  all only where its step gains a quarter of what that of the leading ones does lost .008 there. A look after every four
  rounds that held the others, in place of nine, lost .035 of AUROC with an MLP on PhysioNet with inverted labels (500
  records, epsilon 1).
* *Length of small samples.* Clipped private gradients vary 2 to 5 times as much as public ones under a shift, not the
  1.5 that `flow` counts, and the curvature of the loss whose gradients are the clipped ones is less than K, by what
  clipping keeps of second moments. With up to 1000 records the factor 3 gained .0006 on PhysioNet and lost .0007 on
  MNIST after brief pretraining, that curvature (.3 of K at least) lost .0005 on PhysioNet; both together gained .0006
  there and .0004 on MNIST after long pretraining. But they shorten the first steps, and lost .002 in 52 small tasks,
  .03 to .05 in those of a heavy shift with 500 records at epsilon 1.
* *Rounds and length.* Six rounds in place of twelve lost .001 to .003 at epsilon 8, and twelve in place of 24 as much
  at 10,000 records. At epsilon .5 to 2 (linear and MLP, 20 seeds) at least four, five or six in place of eight lost
  .0003, .0002 and .0002 (+- .0001), twelve changed nothing. With four, steps that begin at half or twice the length,
  grow or shrink from round to round, or spend what those before left, lost .0003 to .001 more. The best of 15 multiples
  of the length (1/4 to 4) and numbers of rounds (4, 16, the rule's) in each of 58 cells, picked on the test set as
  rivals' settings are, would gain .0006. A length of its own for the block of all others changed nothing. Steps bounded
  by the public curvature overshot in every round on PhysioNet by ICU. Means of the last iterates, and moves 15 % longer
  or shorter, changed little, for better and worse. 160 rounds under a heavy shift gained up to .005 in twice the time.
* *Steps under a heavy shift.* On turned images 80 rounds without any noise reach .888: a few private directions are
  steep and set the pace. Momentum, three or four times the length and means of iterates changed +-.003 there; steps
  three to ten times as long, or growing, gained up to .1 in tables of inverted labels and lost .015 to .04 on
  PhysioNet. J with the signal that is left, or the anchor's shares of it, lost .01 to .03; so did no allowance for
  noise in `flow.signal_left`, and a bound on what every step promises, not the first alone (`flow.advance`).
  One step for all directions, however steep, of the length that the tolerated noise allows took a linear model on
  PhysioNet with signs turned from .782 to .809 (2000 records, epsilon 8), but with moved features it lost .01 at
  epsilon 1 and ended at a loss of 3 in place of .4 at epsilon 8. Momentum of .8, or steps that are now and then four
  times as long (silver steps), gained .01 with signs turned and lost .04 to .08, or .02 to .05, on digits at epsilon 1.
  To expect all others as steep as the leading ones were found gained .001 (+- .001) on 50 small tasks and lost .002 on
  turned images (MLP, epsilon 8). To call a shift heavy for good changed seven releases of 500, hardly for the better.
* *Second order from releases.* Pooled Newton steps failed at large budgets on networks, which are no quadratics there.
  A damped Newton step by regression of the latest 20 releases on where they were made took PhysioNet with signs turned
  from .782 to .805 (linear, 2000 records, epsilon 8), lost .012 at epsilon 1 with MLPs and .001 on average over 50
  small tasks, and overshot without end in a narrow valley. To forget at the split what the rounds before it showed of
  steepness and signal gained .006 in eleven cells where the rule is weak, lost .004 in seven others and .007 on turned
  images at epsilon 1. A steepness or a length of its own for each direction changed +-.03.
* *Other uses of the budget.* Block James-Stein shrinkage of the released sum over-shrinks; a private diagonal
  curvature (T7) cost more budget than it returned. The private second moments of nine blocks of directions, even if
  they were known exactly, gained .005 to .017 on tables with moved or noisy features and a linear model, lost up to
  .014 with an MLP and changed the arena by .002 both ways. A noisy count of the units that are clipped at the anchor,
  for a 25th of the budget, tells a shift: where a tenth of public records are clipped, .10 to .12 of private ones were
  without a shift, .20 to .22 on PhysioNet by ICU, .26 to .29 on MNIST by writers, .37 to .9 under heavier shifts (but
  .18 with moved features). As one more observation of the shift it gained .0004 (+- .0001) with none, .0002 (+- .0002)
  on MNIST, and lost .0007 (+- .0003) on PhysioNet by ICU; known exactly, it lowered the losses of digits turned or
  transposed by .03 to .08 and cost PhysioNet with inverted labels up to .04 of AUROC (means over models; 500 records).

The rule is ours. It reads N and the budget, which are public, and is deterministic given its key.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax import clip_norms, flow
from qexp_jax import precision as precisions
from qexp_jax import survey as surveys
from qexp_jax.accuracy import noise_cost
from qexp_jax.clip_norms import Gradients
from qexp_jax.directions import Directions
from qexp_jax.flow import Belief, Spectrum
from qexp_jax.precision import Precision
from qexp_jax.records import LossFn, Params, Record, num_records
from qexp_jax.subspace import Layout, Subspace

_DAMPING = 0.01
_CLIP_QUANTILES = (0.9, 0.95, 0.98)
_SMALLEST_CLIP_NORM = 1e-18  # C, C z and sums of C stay within float32
_SMALLEST_NOISE, _LARGEST_NOISE = 1e-15, 1e11  # of the mean gradient: products of four are within float32
_NOISE_COST = 0.006
_LONGEST = 4.0
_LONGER_UNDER_HEAVY_SHIFT = 2.0, 4.0  # where all is tuned; where the leading directions are
_LEAST_ROUNDS, _COMMON_ROUNDS, _MOST_ROUNDS, _HEAVY_ROUNDS = 8, 12, 24, 80
_HEAVY_SHIFT = 0.02
_WHOLE_AGAIN = 0.75  # of the rounds; from there on clip norms are whole under a heavy shift as well
_LOOKS_AT_ALL = 0.2  # share of the rounds so far that, under a heavy shift, tuned all parameters at least
_LONGEST_HOLD = 9  # rounds in a row that may hold the others there
_PRIVATE_CURVATURE = 1.5  # private over public curvature: 1 to 2.4 was found under shift
_EXPECTED_SHIFT = 1.5e-3


class Geometry(NamedTuple):
    """How a round clips, draws and moves; public. A plan holds several, with a leading axis.

    Attributes:
      eigenvalues: (r + 1,) of M, in the spectrum's directions and in all others.
      tuned: (r + 1,) one, or zero where M is infinite, which holds the parameters fixed.
      l2_clip_norm: C, in the norm whitened by M.
      longest: most that the steps of all rounds may add up to, unless the shift is heavy.
      pull: (r,) what clipping at C adds to the public mean gradient along the leading directions; a round takes it off
        the mean it released. Of a round's geometry 0 under a heavy shift.
      share: of C, at which units are clipped instead under a heavy shift; of a round's geometry, what its C is a share
        of. Sums are divided by it, so that gradients that are clipped either way count the same.
    """

    eigenvalues: jax.Array
    tuned: jax.Array
    l2_clip_norm: jax.Array
    longest: jax.Array
    pull: jax.Array
    share: jax.Array


class Plan(NamedTuple):
    """What the rounds need beside the private records; all of it public.

    Attributes:
      subspace: P, with orthonormal columns.
      damping: lambda, in units of curvature.
      rounds: T.
      most_rounds: what T becomes under a heavy shift.
      spectrum: curvature and moments in coordinates whitened by the first geometry, for `flow`.
      geometries: among which a round chooses: first all parameters, then the leading directions.
      expected_cost: loss per record that the noise of one round is expected to cost, where the private gradient is as
        far from the public one as is common.
      evidence: the public numbers that decided, for the certificate.
    """

    subspace: Subspace
    damping: float
    rounds: int
    most_rounds: int
    spectrum: Spectrum
    geometries: Geometry
    expected_cost: float
    evidence: dict[str, Any]


def make_plan(
    key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    public: Record,
    clip_loss_fn: LossFn,
    public_units: Record,
    *,
    num_units: int,
    noise_multiplier: float,
    rounds: int | None = None,
    precision_rank: int = 128,
    layout: Layout | None = None,
    subspace: Subspace | None = None,
    subspace_dim: int | None = None,
    damping: float | None = None,
    l2_clip_norm: float | None = None,
    weights: np.ndarray | None = None,
    unit_weights: np.ndarray | None = None,
) -> Plan:
    """Chooses what is not given.

    Args:
      key: public randomness: which records, which trial noise.
      loss_fn: loss of one record, for the curvature.
      params: the anchor.
      public: public records.
      clip_loss_fn: loss of one unit, whose gradients are clipped.
      public_units: public units; the same as `public` where a unit is a record.
      num_units: N.
      noise_multiplier: z of the whole budget spent in one round.
      rounds: T, in place of the choice, whatever the shift.
      precision_rank: at most how many leading directions have their curvature measured; as many public gradients.
      layout: says which leaves are tuned where no subspace does; by default all.
      subspace: public subspace; by default all parameters, or a count-sketch of them where a sample of gradients would
        not fit.
      subspace_dim: tune in the leading public eigenspace of this dimension.
      damping: lambda, in units of curvature.
      l2_clip_norm: C in the norm |M^{-1/2} g|, where M has largest eigenvalue 1.
      weights: of the public records, as a tilt leaves them.
      unit_weights: of the public units.

    Raises:
      ValueError: if the public curvature is unusable, public losses or what follows from them are not finite, or public
        gradients vanish; no private record has been read then.
    """
    *keys, trial_key = _keys(key)
    surveyed = surveys.survey(
        keys, loss_fn, params, public, clip_loss_fn, public_units,
        precision_rank=precision_rank, layout=layout, subspace=subspace, subspace_dim=subspace_dim,
        weights=weights, unit_weights=unit_weights,
    )  # fmt: skip
    damping = _DAMPING * float(surveyed.curvature.max()) if damping is None else damping
    curvature, dims, space = surveyed.curvature, surveyed.dims, surveyed.subspace
    eigenvalues = np.sqrt((curvature + damping) / (curvature.max() + damping))
    gradients = Gradients(surveyed.leading / np.sqrt(eigenvalues[:-1]), surveyed.squares / eigenvalues, dims)
    as_arrays = functools.partial(_on_device, dtype=surveyed.directions.dtype)
    root = as_arrays(eigenvalues)
    precision = precisions.spectral(root[-1], surveyed.directions, root[:-1])
    tolerance, cost = surveys.tolerated_noise(
        trial_key, loss_fn, params, space, precision, surveyed.tried, _NOISE_COST
    )  # fmt: skip
    curvature = _whitened_curvature(curvature / eigenvalues, dims, 2 * cost / tolerance**2)
    prior = flow.shift_prior(num_records(public_units))
    spectrum = Spectrum(surveyed.directions, *as_arrays((curvature, dims, dims, *prior, cost / _NOISE_COST)))
    per_unit = float(noise_multiplier) / num_units
    tolerances = tolerance, np.sqrt(2 * _PRIVATE_CURVATURE * cost / np.sum(curvature[:-1]))
    quantile = _clip_quantile(gradients, spectrum, num_units, per_unit, _LONGEST * tolerance / per_unit)
    found = _geometries(gradients, eigenvalues, curvature, tolerances, per_unit, quantile, l2_clip_norm)
    _, _, clip_norm, longest, pull = found[0]
    _check_noise(clip_norm * per_unit)
    longest = float(np.float32(longest))
    share = 1.0 if l2_clip_norm else _share(gradients, clip_norm, spectrum, per_unit, longest)
    stacked = [np.stack(x) for x in zip(*found, strict=True)]
    geometries = Geometry(*as_arrays([*stacked, np.full(len(found), share)]))
    clipped = clip_norms.clipped(gradients, clip_norm)
    moments = np.maximum(clipped.moments, 1e-9 * clipped.moments.max())
    spectrum = spectrum._replace(moments=as_arrays(moments))
    noise_std, largest_curvature = clip_norm * per_unit, float(curvature.max())
    expected = float(_expected_length(spectrum, noise_std**2, num_units, longest))
    most_rounds = _HEAVY_ROUNDS if rounds is None else rounds
    rounds = _rounds(expected * largest_curvature) if rounds is None else rounds
    first, expected_cost = _first_round(spectrum, geometries, noise_multiplier, num_units, rounds)
    evidence = {
        "largest_curvature": largest_curvature,
        "leading_share_of_energy": float(np.sum(moments[:-1]) / np.sum(dims * moments)),
        "tolerated_noise": tolerance,
        "longest_length": longest,
        "expected_length": expected,
        "tuned_at_first": int(np.sum(dims * np.asarray(first.tuned))),
        "public_fraction_clipped": clipped.fraction,
        "clipping_pull_in_clip_norms": float(np.linalg.norm(pull)) / clip_norm,
        "clip_norm_share_under_heavy_shift": share,
    }
    made = Plan(space, damping, rounds, most_rounds, spectrum, geometries, expected_cost, evidence)
    _check_finite(made)
    return made


def _check_finite(plan):
    """Whatever a release rests on is finite before anything is paid for it; held parameters have an infinite M."""
    numbers = plan.evidence | {"damping": plan.damping, "expected_cost": plan.expected_cost}
    arrays = plan.spectrum._replace(directions=None, loss_scale=None)._asdict() | plan.geometries._asdict()
    numbers |= {name: x for name, x in arrays.items() if x is not None and name != "eigenvalues"}
    wrong = sorted(name for name, x in numbers.items() if not np.all(np.isfinite(np.asarray(x, np.float64))))
    if wrong:
        raise ValueError(f"Expected a finite plan from the public records, found no finite {', '.join(wrong)}.")


def looked_at(key: jax.Array, public: Record) -> Record:
    """The public records that a plan of this key reads; more where it has units, or a `subspace_dim`."""
    return surveys.looked_at(_keys(key)[0], public)


def _keys(key):
    """Of records, units, sketch and trials."""
    return jax.random.split(key, 4)


def _on_device(tree, dtype):
    """In one transfer, rounded before."""
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x, dtype), tree))


def precision_of(directions: Directions | jax.Array, geometry: Geometry) -> Precision:
    """M of a geometry; which form it has, all processes read off the same releases."""
    leading, rest = geometry.eigenvalues[:-1], geometry.eigenvalues[-1]
    if float(geometry.tuned[-1]) > 0:
        return precisions.spectral(rest, directions, leading)
    return precisions.leading(directions, leading)


@jax.jit
def choose(
    belief: Belief,
    spectrum: Spectrum,
    geometries: Geometry,
    noise_multiplier: jax.Array | float,
    num_units: int,
    rounds: jax.Array | float,
    done: jax.Array | float = 0.0,
) -> tuple[Geometry, jax.Array]:
    """The geometry of least expected excess given all releases, and its length: post-processing (T5).

    Under a heavy shift the first, of all parameters, where its best step is expected to lower the loss, and wherever no
    more than a fifth of the rounds so far tuned all, or none of the last nine did; else the last. Units are then
    clipped at its share of C, until three quarters of the rounds are done, and no pull is taken off.

    Args:
      belief: what the releases say.
      spectrum: public.
      geometries: of the plan.
      noise_multiplier: z of all rounds together, that of one round over sqrt(T).
      num_units: N.
      rounds: how many such as the next one would spend the whole budget.
      done: share of all rounds that are done.
    """
    signals, rate = (f(belief, spectrum, num_units) for f in (flow.pooled_signal, flow.signal_rate))
    heavy = is_heavy(belief, spectrum, num_units)
    noise_vars = (geometries.l2_clip_norm * noise_multiplier / num_units) ** 2  # of sums over their share of C
    share = jnp.where(heavy & (done < _WHOLE_AGAIN), geometries.share, 1)
    longer = jnp.where(heavy, jnp.where(geometries.tuned[:, -1] > 0, *_LONGER_UNDER_HEAVY_SHIFT), 1)
    geometries = geometries._replace(
        l2_clip_norm=share * geometries.l2_clip_norm, share=share, longest=longer * geometries.longest,
        pull=jnp.where(heavy, 0, geometries.pull),
    )  # fmt: skip

    def best(geometry, noise_var):
        return flow.best_length(signals, spectrum, noise_var, num_units, geometry.longest, geometry.tuned, rate)

    lengths, costs = jax.vmap(best)(geometries, noise_vars)
    of_all = jax.tree.map(lambda x: x[0], geometries)
    _, change = flow.best_step(
        belief, spectrum, rounds * noise_vars[0], num_units, of_all.longest / rounds, of_all.tuned
    )  # fmt: skip
    must_look = (belief.times[-1] <= _LOOKS_AT_ALL * belief.times[0]) | (belief.idle[-1] >= _LONGEST_HOLD)
    far_from_anchor = jnp.where(must_look | (change < 0), 0, len(costs) - 1)
    chosen = jnp.where(heavy, far_from_anchor, jnp.argmin(costs))
    return jax.tree.map(lambda x: x[chosen], geometries), lengths[chosen]


@jax.jit
def is_heavy(belief: Belief, spectrum: Spectrum, num_units: int) -> jax.Array:
    """Whether the releases show a shift that asks for more rounds and longer ones: post-processing (T5)."""
    return flow.pooled_shift(belief, spectrum, num_units) > _HEAVY_SHIFT


def _geometries(gradients, eigenvalues, curvature, tolerances, per_unit, quantile, given):
    """Each `Geometry` but for its share: of all parameters, and of the leading directions where there are others."""
    whole = np.ones_like(gradients.dims)
    found = []
    for tuned, tolerance in zip((whole, np.append(whole[:-1], 0)), tolerances, strict=True):
        seen = gradients._replace(dims=gradients.dims * tuned)
        clip_norm = _clip_norm(seen, quantile, given)
        held, longest = np.where(tuned, eigenvalues, np.inf), _LONGEST * tolerance / (clip_norm * per_unit)
        found.append((held, tuned, clip_norm, longest, clip_norms.pull(seen, clip_norm, curvature[:-1])))
    return found if gradients.dims[-1] > 0 else found[:1]


def _first_round(spectrum, geometries, noise_multiplier, num_units, rounds):
    """The geometry before any release, and what the noise of a round is expected to cost in it."""
    geometry, multiples = _first_step(spectrum, geometries, noise_multiplier, num_units, rounds)
    noise_std = float(geometry.l2_clip_norm) * noise_multiplier * rounds**0.5
    cost, _ = noise_cost(spectrum.curvature, multiples, spectrum.dims, noise_std=noise_std, num_units=num_units)
    return geometry, cost


@jax.jit
def _first_step(spectrum, geometries, noise_multiplier, num_units, rounds):
    belief = flow.before_release(spectrum)
    geometry, length = choose(belief, spectrum, geometries, noise_multiplier, num_units, rounds)
    multiples, _ = flow.advance(belief, spectrum, length / rounds, num_units, geometry.tuned)
    return geometry, multiples


def _rounds(length: float) -> int:
    """T for a length in units of one over the largest curvature."""
    most = np.clip(np.ceil(length / 2), _COMMON_ROUNDS, _MOST_ROUNDS)
    return int(np.clip(np.ceil(length), _LEAST_ROUNDS, most))


def _clip_quantile(gradients, spectrum, num_units, per_unit, reach):
    """Which quantile of the norms has the least expected excess where all is tuned; `reach` is C times longest."""
    norms = clip_norms.norms(gradients)

    def expected_excess(quantile):
        clipped = clip_norms.clipped(gradients, float(np.quantile(norms, quantile)))
        noise_var, longest = (clipped.l2_clip_norm * per_unit) ** 2, reach / clipped.l2_clip_norm
        return float(clip_norms.least(_EXPECTED_SHIFT, clipped, spectrum, noise_var, num_units, longest))

    return min(_CLIP_QUANTILES, key=expected_excess)


def _clip_norm(gradients, quantile, given):
    """C, a float32."""
    clip_norm = np.quantile(clip_norms.norms(gradients), quantile) if given is None else given
    if not _SMALLEST_CLIP_NORM <= clip_norm <= 1 / _SMALLEST_CLIP_NORM:
        raise ValueError(f"Expected a clip norm in [1e-18, 1e18], found {clip_norm}; give l2_clip_norm.")
    return float(np.float32(clip_norm))


def _check_noise(noise_std):
    if not _SMALLEST_NOISE <= noise_std <= _LARGEST_NOISE:
        raise ValueError(
            f"Expected noise of {_SMALLEST_NOISE} to {_LARGEST_NOISE} in the mean gradient, found {noise_std}: "
            "multiply the loss by a number that brings its gradients near 1."
        )


def _share(gradients, clip_norm, spectrum, per_unit, longest):
    """That of the clip norm under a heavy shift, where all is tuned for as long as may be."""
    noise_var, length = (clip_norm * per_unit) ** 2, _LONGER_UNDER_HEAVY_SHIFT[0] * longest
    return clip_norms.share_under_heavy_shift(gradients, clip_norm, spectrum, noise_var, length)


def _whitened_curvature(curvature, dims, trace):
    """K (r + 1,), for the private quadratic.

    The rest has what the leading directions leave of the trace that the tolerated noise shows, but not less than its
    second moments say, and not more than a leading direction.
    """
    leading, rest = curvature[:-1], curvature[-1]
    remainder = (trace - np.sum(leading)) / max(1, dims[-1])
    curvature = np.append(leading, min(max(rest, remainder), leading.min()))
    return _PRIVATE_CURVATURE * np.maximum(curvature, 1e-6 * curvature.max())


@jax.jit
def _expected_length(spectrum, noise_var, num_units, longest):
    """The length that the common shift deserves where all is tuned."""
    return flow.best_length(_EXPECTED_SHIFT * spectrum.moments, spectrum, noise_var, num_units, longest)[0]
