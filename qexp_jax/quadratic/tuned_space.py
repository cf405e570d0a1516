"""The public space that is tuned in: all parameters, a count-sketch of them, a leading eigenspace, or the caller's own.

What no public record moves is held (`held_where_still`).
"""

import functools

import jax
import numpy as np

from qexp_jax.data.records import LossFn, Params, Record, num_records, take
from qexp_jax.model import subspace as subspaces
from qexp_jax.model.factored_gradients import Rows
from qexp_jax.model.gradients import at_a_time
from qexp_jax.model.subspace import Layout, Subspace
from qexp_jax.numerics.compilation import compiled
from qexp_jax.quadratic.eigenspace import top_eigenspace

_GRADIENT_BYTES = 2**30  # that a sample of gradients may take
_SKETCH_DIM = 4096


def tuned_space(key: jax.Array, layout: Layout, num_records: int, subspace: Subspace | None, dim: int = 0) -> Subspace:
    """The given subspace; or all parameters, or a count-sketch of them where a sample of gradients would not fit.

    Args:
      key: public randomness: the sketch.
      layout: of the tuned leaves.
      num_records: in a sample of gradients, of four bytes a number.
      subspace: the caller's own.
      dim: least dimension of a count-sketch.
    """
    if subspace is not None:
        return subspace
    whole = subspaces.whole_of(layout)
    if whole.dim * num_records * 4 <= _GRADIENT_BYTES:
        return whole
    return subspaces.count_sketch_of(key, layout, max(_SKETCH_DIM, dim))


def orthonormal_space(
    key: jax.Array,
    loss_fn: LossFn,
    params: Params,
    layout: Layout,
    curved: Record,
    public: Record,
    subspace: Subspace | None,
    dim: int | None,
) -> Subspace:
    """The space that is tuned in, with orthonormal columns, so that norms in it are those of the parameters.

    Args:
      key: public randomness: the sketch.
      loss_fn: loss of one record.
      params: initial parameters theta_0.
      layout: of the tuned leaves.
      curved: the sample of public records that gives the directions.
      public: all of them, where the sample has fewer than `dim`.
      subspace: the caller's own.
      dim: of a leading public eigenspace.

    Raises:
      ValueError: if `dim` is more than there are parameters or public records.
    """
    if subspace is not None:
        return subspaces.orthonormalise(subspace)
    num_params = layout.num_params
    if dim is not None and not 1 <= dim <= num_params:
        raise ValueError(f"Expected subspace_dim in [1, {num_params}], found {dim}.")
    records = public if dim is not None and dim > num_records(curved) else curved
    whole = tuned_space(key, layout, num_records(records), None, dim or 0)
    if dim is None or dim == whole.dim:
        return whole
    if dim > num_records(records):
        raise ValueError(
            f"subspace_dim={dim} needs as many public records, found {num_records(records)}; or give a subspace, "
            "such as count_sketch."
        )
    # As few as hold the dimension: a gradient of each is stored.
    sample = take(records, slice(0, max(dim, num_records(curved))))
    return _top_eigenspace(loss_fn, params, sample, dim, whole)


@functools.partial(compiled, static_argnums=(0, 3))
def _top_eigenspace(loss_fn: LossFn, params: Params, records: Record, dim: int, within: Subspace) -> Subspace:
    """That of `eigenspace.top_eigenspace`, with microbatches that fit."""
    size = at_a_time(loss_fn, params, within, records)
    space, _ = top_eigenspace(loss_fn, params, records, dim, within=within, microbatch_size=size)
    return space


def held_where_still(space: Subspace, moved: Rows) -> Subspace:
    """The space, holding what no public record moves: nothing is known of a step there but its noise.

    Args:
      space: P; where it is not whole, as it is.
      moved: of each tuned leaf, whether any record's gradient is not zero.
    """
    if not subspaces.is_whole(space):
        return space
    held = subspaces.holding(space, jax.tree.map(np.asarray, moved))
    # A space that holds nothing, or all, is left as it is: there is nothing to gain, or nothing to tune.
    return held if 0 < subspaces.num_moved(held) < space.dim else space
