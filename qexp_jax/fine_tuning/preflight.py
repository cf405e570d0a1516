"""Memory and arithmetic of a release, known before any data is read.

Bytes come from compiling the programs that will run, on shapes alone: nothing is allocated. Floating-point operations
are counted in their traces, loops times their length, which XLA's own count leaves out. Both depend on shapes only.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, held, num_records
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.gradients import Mode
from qexp_jax.model.operations import count_flops
from qexp_jax.model.subspace import Subspace
from qexp_jax.private_pass import passes
from qexp_jax.private_pass.passes import Linearisation
from qexp_jax.quadratic import noise_trials, public_curvature, tilted_training
from qexp_jax.quadratic import precision as precisions
from qexp_jax.quadratic.directions import Directions
from qexp_jax.quadratic.public_samples import num_curved, num_held_out
from qexp_jax.quadratic.tuned_space import tuned_space


class Estimate(NamedTuple):
    """What one device holds and what all devices compute.

    Attributes:
      parameter_bytes: of the parameters.
      released_bytes: of the tuned ones again, since the pretrained ones stay beside those of the last round.
      data_bytes: of the private units (of one batch, for a stream), held through a pass.
      public_bytes: of subspace and precision.
      microbatch_bytes: gradients, activations and panels of one microbatch: what `microbatch_size` moves.
      pass_bytes: peak of a private pass, all of the above together.
      plan_bytes: peak of the largest step of the public plan.
      tilt_bytes: peak of training on weighted public records.
      tilt_gradients: public gradients that this training evaluates, if it is made; 0 where it would take too long.
      flops: floating-point operations of all private passes, on all devices.
      dim: k.
      num_params: d.
    """

    parameter_bytes: int
    released_bytes: int
    data_bytes: int
    public_bytes: int
    microbatch_bytes: int
    pass_bytes: int
    plan_bytes: int
    tilt_bytes: int
    tilt_gradients: int
    flops: float
    dim: int
    num_params: int

    @property
    def peak_bytes(self) -> int:
        """The most that one device holds at any time."""
        return max(self.pass_bytes, self.plan_bytes, self.tilt_bytes)


def estimate(
    loss_fn: LossFn,
    params: Params,
    record: Record,
    *,
    num_units: int,
    num_public: int,
    subspace: Subspace | None = None,
    precision_rank: int = 128,
    microbatch_size: int | None = None,
    mode: Mode = "auto",
    rounds: int = 1,
    num_devices: int = 1,
    batch_size: int | None = None,
    exact: bool = False,
    tilt: bool = True,
) -> Estimate:
    """What `fine_tune` will need with these settings.

    Args:
      loss_fn: loss of one unit.
      params: parameters, or their `jax.ShapeDtypeStruct`s.
      record: one unit without a leading axis, or its shapes.
      num_units: private units in all.
      num_public: public records.
      subspace: as in `fine_tune`.
      precision_rank: as in `fine_tune`.
      microbatch_size: as in `fine_tune`.
      mode: as in `fine_tune`.
      rounds: passes.
      num_devices: devices that share the units.
      batch_size: units of a batch, where the private data is a stream.
      exact: as `clipping.unit_sum` takes it where the number of units is private.
      tilt: whether the model may be trained on weighted public records.

    >>> params, record = {"w": jnp.zeros((100, 10))}, {"x": jnp.zeros(100), "label": jnp.zeros((), int)}
    >>> def loss_fn(params, record):
    ...     return jax.nn.logsumexp(record["x"] @ params["w"]) - (record["x"] @ params["w"])[record["label"]]
    >>> found = estimate(loss_fn, params, record, num_units=1000, num_public=500)
    >>> found.num_params, found.parameter_bytes, found.peak_bytes < 10e6
    (1000, 4000, True)
    """
    params = _shapes(params)
    record = _shapes(record)
    curved = num_curved(num_public)
    space = tuned_space(jax.random.key(0), subspaces.layout_of(params), curved, subspace)
    directions = _directions(loss_fn, params, record, num_public, min(precision_rank, space.dim, curved), space)
    per_device = -(-min(batch_size or num_units, num_units) // num_devices)
    one_pass = _pass_of(
        loss_fn, params, _batch(record, per_device), space, directions,
        microbatch_size=microbatch_size, mode=mode, exact=exact,
    )  # fmt: skip
    steps = tilted_training.num_steps(loss_fn, params, record, num_public) if tilt else 0
    parameter_bytes = _bytes(params)
    released_bytes = space.layout.num_params * space.layout.dtype.itemsize
    return Estimate(
        parameter_bytes=parameter_bytes,
        released_bytes=released_bytes,
        data_bytes=one_pass.data_bytes,
        public_bytes=one_pass.public_bytes,
        microbatch_bytes=one_pass.temporary_bytes,
        pass_bytes=parameter_bytes + released_bytes + one_pass.held_bytes,
        plan_bytes=parameter_bytes + _plan_bytes(loss_fn, params, record, num_public, space, directions),
        tilt_bytes=parameter_bytes + _tilt_bytes(loss_fn, params, record, num_public, space, steps) if steps else 0,
        tilt_gradients=tilted_training.num_gradients(steps, num_public),
        flops=one_pass.flops / per_device * num_units * rounds,
        dim=space.dim,
        num_params=space.layout.num_params,
    )


class _Pass(NamedTuple):
    """What a private pass over one device's units holds beside the parameters, and computes."""

    data_bytes: int
    public_bytes: int
    temporary_bytes: int
    result_bytes: int
    flops: float

    @property
    def held_bytes(self) -> int:
        """At the pass's peak."""
        return self.data_bytes + self.public_bytes + self.temporary_bytes + self.result_bytes


def _pass_of(
    loss_fn: LossFn, params: Params, units: Record, space: Subspace, directions: Directions | jax.Array, **static: Any
) -> _Pass:
    """A private pass, from the program that will run.

    Args:
      loss_fn: loss of one unit.
      params: shapes.
      units: shapes of those that one device holds.
      space: what is tuned.
      directions: shapes of the leading public directions.
      **static: of `passes.device_sum`.
    """
    linearisation = Linearisation(params, _shapes(space), _low_rank(directions), 1.0)
    mask = jax.ShapeDtypeStruct((num_records(units),), bool)
    temporary, result = _held(passes.device_sum.lower(loss_fn, linearisation, units, mask, **static))
    return _Pass(
        data_bytes=_bytes(units),
        public_bytes=_bytes((linearisation.subspace, linearisation.precision)),
        temporary_bytes=temporary,
        result_bytes=result,
        flops=count_flops(lambda *a: passes.device_sum(loss_fn, *a, **static), linearisation, units, mask),
    )


def unit_of(record: Record, max_records_per_unit: int) -> Any:
    """The shapes of one unit of `records.group_by_unit`, from those of a record and the public cap.

    >>> unit, mask = unit_of({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, 5)
    >>> unit["x"].shape, mask.shape
    ((5, 3), (5,))
    """
    return _batch(_shapes(record), max_records_per_unit), jax.ShapeDtypeStruct((max_records_per_unit,), bool)


def check(found: Estimate, memory_budget: int) -> None:
    """Raises ValueError, with what takes the memory, where a device would hold more than `memory_budget` bytes."""
    if found.peak_bytes > memory_budget:
        parts = ", ".join(f"{name} {value:,}" for name, value in found._asdict().items() if name.endswith("bytes"))
        raise ValueError(
            f"Expected to fit in {memory_budget:,} bytes a device, found {found.peak_bytes:,} for k = {found.dim}, "
            f"d = {found.num_params} ({parts}). A smaller microbatch_size, precision_rank or subspace needs less, a "
            "stream holds one batch."
        )


def _shapes(tree: Any) -> Any:
    """A pytree's arrays as `jax.ShapeDtypeStruct`s; those stay as they are."""

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        x = x if isinstance(x, jax.ShapeDtypeStruct) else held(x, "a record or parameters")
        return jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))

    return jax.tree.map(shape, tree)


def _batch(record: Any, length: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((length, *x.shape), x.dtype), record)


def _bytes(tree: Any) -> int:
    """Keys are not counted."""
    leaves = [
        x for x in jax.tree.leaves(tree) if hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    ]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def _directions(
    loss_fn: LossFn, params: Params, record: Record, num_public: int, rank: int, space: Subspace
) -> Directions | jax.Array:
    """The shapes of the leading public directions."""
    curved = _batch(record, num_curved(num_public))
    return public_curvature.leading_directions.eval_shape(loss_fn, params, curved, rank, _shapes(space))[0]


def _low_rank(directions: Directions | jax.Array) -> Any:
    """The shapes of a precision with these directions."""
    values = jax.ShapeDtypeStruct((len(directions),), directions.dtype)
    return jax.eval_shape(precisions.low_rank, values.update(shape=()), directions, values)


def _plan_bytes(
    loss_fn: LossFn,
    params: Params,
    record: Record,
    num_public: int,
    space: Subspace,
    directions: Directions | jax.Array,
) -> int:
    """Both samples, held throughout, and the largest of the programs that read them, with the directions it needs."""
    shapes = _shapes(space)
    curved = _batch(record, num_curved(num_public))
    held_out = _batch(record, num_held_out(num_public))
    found = sum(_held(public_curvature.leading_directions.lower(loss_fn, params, curved, len(directions), shapes)))
    of_directions = _bytes(directions)
    for lowered in (
        public_curvature.surveyed_gradients.lower(loss_fn, params, shapes, directions, held_out),
        public_curvature.curvature_along.lower(loss_fn, params, shapes, directions, 0, held_out),
        noise_trials.moved_losses.lower(loss_fn, params, shapes, noise_trials.moves_of(space), 1.0, held_out),
    ):
        found = max(found, of_directions + sum(_held(lowered)))
    return _bytes((curved, held_out)) + found


def _tilt_bytes(loss_fn: LossFn, params: Params, record: Record, num_public: int, space: Subspace, steps: int) -> int:
    """Of the public slope, or of the steps of one program."""
    shapes = _shapes(space)
    part = _batch(record, min(num_public, tilted_training.CHUNK))
    count, size = tilted_training.batch_shape(steps, num_public)
    batches = _batch(_batch(record, size), count)
    carry = jax.eval_shape(lambda: tilted_training.start(space, steps))
    slope = jax.ShapeDtypeStruct((space.dim,), space.layout.dtype)
    weights = jax.ShapeDtypeStruct((count, size), jnp.float32)
    programs = (
        (part, tilted_training.public_slope.lower(loss_fn, params, shapes, part, 1)),
        (batches, tilted_training.train_steps.lower(loss_fn, steps, carry, params, shapes, slope, batches, weights)),
    )
    return max(_bytes(records) + sum(_held(lowered)) for records, lowered in programs)


def _held(lowered: Any) -> tuple[int, int]:
    """Bytes of temporaries and of results, beside the arguments."""
    memory = lowered.compile().memory_analysis()
    if memory is None:
        raise ValueError("The backend does not say what memory a program takes.")
    return memory.temp_size_in_bytes, memory.output_size_in_bytes
