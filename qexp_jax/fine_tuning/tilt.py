"""Weights of public records that tilt them towards a private population, for a training loop of one's own (T9).

One exact draw of the private mean of public features; all else is post-processing (`weighting`). The weights are as
private as a release of `fine_tune`, with a certificate of their own, and may be used for any model and any number of
times.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from qexp_jax.data import validation
from qexp_jax.data.dataset import Dataset, as_dataset
from qexp_jax.data.records import Params, Record
from qexp_jax.data.relation import NeighboringRelation, checked_relation
from qexp_jax.data.source import Source
from qexp_jax.fine_tuning import entry, inputs, tilting
from qexp_jax.fine_tuning.inputs import Inputs
from qexp_jax.fine_tuning.one_pass import PassOptions
from qexp_jax.fine_tuning.options import RunOptions, checked_run
from qexp_jax.fine_tuning.progress import Announce, announcer
from qexp_jax.fine_tuning.tilting import Preparation
from qexp_jax.privacy import accounting
from qexp_jax.privacy import ledger as ledgers
from qexp_jax.privacy.certificate import make_tilt_certificate
from qexp_jax.private_pass import devices
from qexp_jax.private_pass.noise import GAUSSIAN
from qexp_jax.quadratic import weighting
from qexp_jax.quadratic.features import FeatureMap
from qexp_jax.quadratic.weighting import Tilt

_SEED = 0  # of public randomness: which records axes are fitted to


class Weighted(NamedTuple):
    """What may leave the curator.

    Attributes:
      weights: (n,) of the public records, float32, mean one; all one where the draw shows no shift, or one that weights
        of these records cannot express.
      tilt: how they were made, see `weighting.Tilt`.
      features: the public map.
      certificate: JSON-able; depends on public and released values only.
    """

    weights: np.ndarray
    tilt: Tilt
    features: FeatureMap
    certificate: dict[str, Any]


@inputs.with_usual_promotion
def weights(
    key: jax.Array,
    public: Record,
    private: Record | Dataset,
    *,
    epsilon: float,
    delta: float,
    neighboring_relation: NeighboringRelation = NeighboringRelation.REPLACE_SPECIAL,
    ledger: ledgers.Ledger | str | os.PathLike[str] | None = None,
    params: Params = (),
    features: Callable[..., Any] | None = None,
    run: RunOptions = RunOptions(),  # noqa: B008, frozen
) -> Any:
    """Weights of public records under (epsilon, delta)-differential privacy of the private ones.

    Args:
      key: secret typed key; the noise of one draw.
      public: public records, pytree with a leading axis n; or a stream of batches, of which a sample is weighted, and
        the rest by `weighting.weights_of`.
      private: private records, the same pytree with the same shapes, of other arrays; or a stream of batches; or a
        `Dataset`: a unit's features are the mean over its records.
      epsilon: in [1e-4, 1e4].
      delta: in [1e-30, 0.999].
      neighboring_relation: as in `fine_tune`.
      ledger: as in `fine_tune`.
      params: pretrained parameters, for `features` of two arguments.
      features: `(record) -> arrays` or `(params, record) -> arrays`; by default those of the module `features`.
      run: `microbatch_size`, `mesh` and `progress` count.

    Formal guarantee: the result is mu-GDP with `certificate["mu"]`, hence (epsilon, delta)-DP, with respect to
    `neighboring_relation` on units of `private`, under the certificate's assumptions.

    Raises:
      ValueError: for bad static or public input, before any private value is read.
      BudgetExceeded: where the ledger does not allow it.

    >>> x = jax.random.normal(jax.random.key(1), (5000, 2))
    >>> public, private = {"x": x[:4000]}, {"x": x[4000:] + 0.3}
    >>> tilted = weights(jax.random.key(0), public, private, epsilon=1.0, delta=1e-5)
    >>> mean = np.average(public["x"], axis=0, weights=tilted.weights)
    >>> tilted.weights.shape, bool(np.all(abs(mean - 0.3) < 0.15))
    ((4000,), True)

    References:
      Ji and Elkan, Mach. Learn. 93 (2013); Yu et al., arXiv:2305.13865; Dong, Roth and Su, arXiv:1905.02383 (mu-GDP).
    """
    validation.check_key(key)
    relation = checked_relation(neighboring_relation)
    run = checked_run(run)
    announce = announcer(run.progress, rounds=1)
    devices.local_mesh(run.mesh)
    epsilon, delta = accounting.check_budget(epsilon, delta)
    mu = accounting.mu_from_budget(epsilon, delta)
    private = as_dataset("private", private)
    prepared, public = _prepared(public, private, params, features, announce)
    check_loss = functools.partial(tilting.check_features, prepared.features)
    data = inputs.accept(
        key, check_loss, params, Dataset(records=public), private, relation, None, run.mesh
    )  # fmt: skip
    if not data.private.has_shapes_of(data.public):
        raise ValueError("Expected private records of the public ones' shapes, found others.")
    noise_multiplier = accounting.noise_multiplier(mu, relation)
    options, units = _pass_of_units(prepared, data, relation, run, announce)
    entry.enter(
        ledgers.opened(ledger), data.key, None, units, run.mesh,
        mu=mu, hardened=GAUSSIAN.hardened, neighboring_relation=relation, privacy_unit=data.unit,
    )  # fmt: skip
    noisy, noise_std = tilting.draw(data.key, data.key, prepared, units, options, noise_multiplier=noise_multiplier)
    num_units = data.num_units
    tilted = weighting.fit(prepared.rows, noisy / num_units, noise_std / num_units, num_units)
    certificate = make_tilt_certificate(
        epsilon=epsilon, delta=delta, relation=relation, num_units=num_units,
        num_units_from=data.num_units_from, unit=data.unit, public=data.public,
        prng_impl=str(jax.random.key_impl(data.key)), tilt=tilting.terms(prepared, tilted, noise_multiplier, 0),
    )  # fmt: skip
    return Weighted(tilted.weights, tilted, prepared.features, certificate)


def _prepared(
    public: Record, private: Dataset, params: Params, features: Callable[..., Any] | None, announce: Announce
) -> tuple[Preparation, Record]:
    """Features of the public records, and these in memory.

    Args:
      public: records or a stream.
      private: looked at only to see that it holds other arrays.
      params: for features of two arguments.
      features: as given.
      announce: who is told of stages.
    """
    validation.check_apart(public, private.records)
    public = inputs.public_records(public)
    validation.check_records("public", public)
    validation.check_finite("public records", public)
    announce("tilt, public features")
    prepared = tilting.prepare(jax.random.key(_SEED), params, public, features)
    if prepared is None:
        raise ValueError("Expected public records that vary, found none.")
    return prepared, public


def _pass_of_units(
    prepared: Preparation, data: Inputs, relation: NeighboringRelation, run: RunOptions, announce: Announce
) -> tuple[PassOptions, Source]:
    """How the pass over the units runs, and the units.

    Args:
      prepared: the features, which the pass takes for gradients.
      data: as it was accepted.
      relation: neighbouring relation.
      run: memory and devices.
      announce: who is told of stages.
    """
    private_n = relation is NeighboringRelation.ADD_OR_REMOVE_ONE
    loss_fn, units = inputs.grouped(
        tilting.loss(prepared.features), data.private, data.unit_ids, data.max_records_per_unit
    )  # fmt: skip
    options = PassOptions(
        loss_fn=loss_fn,
        microbatch_size=run.microbatch_size,
        mode="reverse",
        mesh=run.mesh,
        noise=GAUSSIAN,
        exact=private_n,
        diagnostics=False,
        store=None,
        announce=announce,
    )
    return options, units
