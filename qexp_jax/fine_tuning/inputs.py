"""The door: records, units and keys as they come in, checked before any private value is read.

Structure first, then types, then shapes, so that whatever an error names is public.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data import arguments, stream, validation
from qexp_jax.data.dataset import Dataset
from qexp_jax.data.records import LossFn, Params, Record, held, take, unit_loss
from qexp_jax.data.relation import NeighboringRelation
from qexp_jax.data.source import InMemory, Source, source_of
from qexp_jax.fine_tuning import preflight
from qexp_jax.model.subspace import Subspace
from qexp_jax.numerics.keys import as_threefry
from qexp_jax.privacy.certificate import ONE_ID, ONE_RECORD
from qexp_jax.private_pass import devices

_PUBLIC_SAMPLE = 4096


def with_usual_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """The library counts on JAX's defaults; whoever forbids promotion in their own code may call it all the same."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


class Inputs(NamedTuple):
    """Data as it was accepted; **not private**.

    Attributes:
      key: secret threefry key, the same in every process.
      public: public records in memory.
      private: where the private records come from, as JAX will hold them.
      unit_ids: (n,) of the private records, None where each is a unit.
      public_unit_ids: of the public ones.
      max_records_per_unit: public cap.
      num_units: public N.
      num_units_from: `"slots"` or `"public_count"`.
      unit: what one unit is, in a certificate's words.
    """

    key: jax.Array
    public: Record
    private: Source
    unit_ids: np.ndarray | None
    public_unit_ids: np.ndarray | None
    max_records_per_unit: int | None
    num_units: int
    num_units_from: str
    unit: str


def accept(
    key: jax.Array,
    check_loss: Callable[[Record], None],
    params: Params,
    public: Dataset,
    private: Dataset,
    relation: NeighboringRelation,
    subspace: Subspace | None,
    mesh: jax.sharding.Mesh | None,
) -> Inputs:
    """Data, checked before any private value is read.

    Args:
      key: secret.
      check_loss: raises unless a loss keeps records of these shapes apart (`isolation.check_loss`).
      params: the pretrained parameters.
      public: with records in memory or a stream.
      private: the same.
      relation: neighbouring relation.
      subspace: public, or None.
      mesh: devices, or None.
    """
    private_n = relation is NeighboringRelation.ADD_OR_REMOVE_ONE
    key = secret_key(key, mesh)
    validation.check_apart(public.records, private.records)
    public_held = public_records(public.records, public.unit_ids)
    source = check_data(check_loss, params, public_held, private.records, private_n)
    check_devices(mesh, params, subspace, public_held, source)
    unit_ids = source.aligned_ids("unit_ids", private.unit_ids)
    return Inputs(
        key=key,
        public=public_held,
        private=source,
        unit_ids=unit_ids,
        public_unit_ids=InMemory(public_held).aligned_ids("public_unit_ids", public.unit_ids),
        max_records_per_unit=private.max_records_per_unit,
        num_units=public_num_units(source, unit_ids, private.public_count, private_n, mesh),
        num_units_from="slots" if private.public_count is None else "public_count",
        unit=ONE_RECORD if unit_ids is None else ONE_ID,
    )


def public_records(public: Record, public_unit_ids: Any = None) -> Record:
    """Public records in memory, of a stream a sample, as JAX will hold them."""
    if not stream.is_stream(public):
        return held(public, "public records", hide_length=False)
    if public_unit_ids is not None:
        raise ValueError("A public stream is sampled: public_unit_ids need public records in memory.")
    # The sample is the same in every process and at every start: a checkpoint goes on with the same plan.
    return held(stream.sample(np.random.default_rng(0), public, _PUBLIC_SAMPLE), "public records")


def check_data(
    check_loss: Callable[[Record], None], params: Params, public: Record, private: Record, private_n: bool
) -> Source:
    """The private records as JAX will hold them; of a stream each batch, when it is read.

    Args:
      check_loss: raises unless a loss keeps records of these shapes apart (`isolation.check_loss`).
      params: the pretrained parameters.
      public: of `public_records`.
      private: records or a stream.
      private_n: whether their number is private.

    Raises:
      ValueError: for bad records, of which it tells nothing private.
    """
    validation.check_configuration()
    validation.check_records("public", public)
    validation.check_finite("public records", public)
    validation.check_finite("pretrained parameters", params)
    check_loss(public)
    check = functools.partial(_check_private, check_loss, public)
    return source_of(private).checked(check, private_n=private_n)


def _check_private(
    check_loss: Callable[[Record], None], public: Record, records: Record, *, allow_empty: bool, hide_length: bool
) -> Record:
    """Private records as JAX will hold them; none are none of the public ones' shapes.

    Structure first, then types, so that nothing is converted that JAX cannot hold.

    Args:
      check_loss: raises unless a loss keeps records of these shapes apart.
      public: of `public_records`.
      records: private.
      allow_empty: whether there may be none.
      hide_length: whether their number is private.
    """
    validation.check_same_structure(public, records)
    records = held(records, "private records", hide_length=hide_length)
    if not validation.check_records("private", records, allow_empty=allow_empty, hide_length=hide_length):
        return take(public, slice(0, 0))
    check_loss(records)
    return records


def check_devices(
    mesh: jax.sharding.Mesh | None, params: Params, subspace: Subspace | None, public: Record, private: Source
) -> None:
    """Raises where arrays lie on several devices; of a mesh, the private records go to its devices wherever they are.

    Args:
      mesh: devices, or None.
      params: the pretrained parameters.
      subspace: public, or None.
      public: records in memory.
      private: where the private records come from.
    """
    arrays = {"params": params, "public": public, "subspace": None if subspace is None else subspace.arrays}
    validation.check_devices(**arrays if mesh is not None else arrays | {"private": private})


def secret_key(key: jax.Array, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """A threefry key, the same in every process, free to go where it is used: a mesh has devices of its own."""
    key = devices.one_key(as_threefry(key), mesh)
    if not key.committed:
        return key
    words = jnp.asarray(np.asarray(jax.random.key_data(key)))
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))


def grouped(
    loss_fn: LossFn, source: Source, unit_ids: np.ndarray | None, max_records_per_unit: int | None
) -> tuple[LossFn, Source]:
    """The loss of one unit, and the units.

    Args:
      loss_fn: of one record.
      source: of records; a stream's are whole units.
      unit_ids: (n,) of `Source.aligned_ids`, None where each record is a unit.
      max_records_per_unit: public cap.
    """
    if unit_ids is None:
        return loss_fn, source
    return unit_loss(loss_fn), source.grouped(unit_ids, max_records_per_unit)


def public_num_units(
    private: Source,
    unit_ids: np.ndarray | None,
    public_count: int | None,
    private_n: bool,
    mesh: jax.sharding.Mesh | None,
) -> int:
    """N, which enters step and noise and must be public.

    Args:
      private: where the private records come from.
      unit_ids: (n,) of `Source.aligned_ids`.
      public_count: as given.
      private_n: whether the number of units is private.
      mesh: devices, or None.
    """
    if public_count is None and private_n:
        raise ValueError("ADD_OR_REMOVE_ONE keeps the number of private units private: give a public_count.")
    if public_count is None and devices.spans_processes(mesh):
        raise ValueError("Several processes hold the private units: give a public_count of all of them.")
    if public_count is None and unit_ids is not None:
        public_count = len(np.unique(unit_ids))
    if public_count is None:
        public_count = private.num_records()
    public_count = arguments.count("public_count", public_count)
    if public_count >= 2**31:
        raise ValueError(f"Expected an integer public_count in [1, 2^31), found {public_count}.")
    return public_count


def one_unit(data: Inputs) -> Any:
    """The shapes of one unit, from those of a record and the public cap: they are the same whatever the ids are."""
    record = data.private.record_shapes(data.public)
    if data.unit_ids is None or data.max_records_per_unit is None:
        return record
    return preflight.unit_of(record, data.max_records_per_unit)
