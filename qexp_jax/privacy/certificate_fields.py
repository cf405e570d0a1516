"""The fields of a certificate: which there are, and what each may hold. How they hang together is `verification`'s.

A table of kinds, nested as certificates are, against which `conform` holds a certificate from outside: everything that
JSON can write is expected.
"""

import re
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from qexp_jax.data.relation import NeighboringRelation
from qexp_jax.privacy import accounting
from qexp_jax.privacy.certificate import PRIVACY_UNITS, PRNG_IMPL, SCHEMA, TILT_SCHEMA, VERSIONS
from qexp_jax.privacy.subspace_names import is_certified_name

# What a share of the budget may be for, and its sensitivity in units of the share's clip norm.
SHARE_SENSITIVITY = {
    "gradient": accounting.sensitivity,
    "tilt": accounting.sensitivity,
}


class _Kind(NamedTuple):
    """What a field may hold, in words and as a test that takes anything and raises nothing."""

    words: str
    holds: Callable[[Any], bool]


def is_number(x: Any) -> bool:
    """Whether it is a finite number: JSON knows 10^400, and to Python True is 1."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def _is_integer(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _one_of(values: Collection[str]) -> _Kind:
    return _Kind(f"one of {list(values)}", lambda x: isinstance(x, str) and x in values)


def _within(least: float, most: float) -> _Kind:
    return _Kind(f"a number in [{least:g}, {most:g}]", lambda x: is_number(x) and least <= x <= most)


_NOT_NEGATIVE = _Kind("a finite number >= 0", lambda x: is_number(x) and x >= 0)
_POSITIVE = _Kind("a finite number > 0", lambda x: is_number(x) and x > 0)
_PROBABILITY = _within(0, 1)
_SHARE = _within(0, 1 + 1e-6)  # of float32 numbers, which add up to one within their rounding
_POSITIVE_OR_NONE = _Kind("null or a finite number > 0", lambda x: x is None or (is_number(x) and x > 0))
_ROUNDING = _Kind("a number in [0, 0.25)", lambda x: is_number(x) and 0 <= x < 0.25)
_COUNT = _Kind("an integer in [1, 2^63)", lambda x: _is_integer(x) and 1 <= x < 2**63)
_TEXT = _Kind("a text", lambda x: isinstance(x, str) and x != "")
_SHA256 = _Kind("a SHA-256 digest", lambda x: isinstance(x, str) and re.fullmatch("[0-9a-f]{64}", x) is not None)
_SHA256_OR_NONE = _Kind("null or a SHA-256 digest", lambda x: x is None or _SHA256.holds(x))
_SUBSPACE = _Kind("a name of a subspace of this library", lambda x: isinstance(x, str) and is_certified_name(x))
_VERSION = _Kind("the number of a version", lambda x: isinstance(x, str) and VERSIONS.fullmatch(x) is not None)
_FLAG = _Kind("true or false", lambda x: isinstance(x, bool))

# Exactly these: a field that is unknown could promise what nobody checks.
FIELDS: dict[str, Any] = {
    "schema": _Kind(repr(SCHEMA), lambda x: isinstance(x, str) and x == SCHEMA),
    "mechanism": _TEXT,
    "hardened": _FLAG,
    "epsilon": _within(*accounting.EPSILON_RANGE),
    "delta": _within(*accounting.DELTA_RANGE),
    "mu": _POSITIVE_OR_NONE,
    "zcdp_rho": _POSITIVE,
    "privacy_curve": [{"epsilon": _NOT_NEGATIVE, "delta": _PROBABILITY}],
    "budget": [
        {
            "purpose": _one_of(SHARE_SENSITIVITY),
            "noise_multiplier": _POSITIVE,
            "mu": _POSITIVE_OR_NONE,
            "zcdp_rho": _POSITIVE,
        }
    ],
    "neighboring_relation": _one_of([relation.name for relation in NeighboringRelation]),
    "neighbors": _TEXT,
    "privacy_unit": _one_of(PRIVACY_UNITS),
    "num_units": _COUNT,
    "num_units_from": _one_of(["slots", "public_count"]),
    "rounds": _COUNT,
    "most_rounds": _COUNT,
    "mu_per_round": _POSITIVE_OR_NONE,
    "noise_multiplier": _POSITIVE,
    "tilt": _Kind("null or a mapping", lambda x: x is None or isinstance(x, dict)),
    "geometries": [{"tuned_dim": _COUNT, "l2_clip_norm": _POSITIVE, "rounding": _ROUNDING}],
    "discrete_noise": _Kind("null or a mapping", lambda x: x is None or isinstance(x, dict)),
    "subspace": _SUBSPACE,
    "subspace_dim": _COUNT,
    "precision_rank": _COUNT,
    "damping": _POSITIVE,
    "expected_excess_loss_per_round": _NOT_NEGATIVE,
    "public_evidence": {
        "largest_curvature": _POSITIVE,
        "leading_share_of_energy": _SHARE,
        "tolerated_noise": _POSITIVE,
        "longest_length": _NOT_NEGATIVE,
        "tuned_at_first": _COUNT,
        "public_fraction_clipped": _SHARE,
        "clipping_bias_in_clip_norms": _NOT_NEGATIVE,
    },
    "provenance": {"anchor_sha256": _SHA256, "public_records_sha256": _SHA256, "subspace_sha256": _SHA256_OR_NONE},
    "dtype": _one_of(["float32", "float64"]),
    "prng_impl": _one_of([PRNG_IMPL]),
    "assumptions": [_TEXT],
    "versions": {"qexp_jax": _VERSION, "jax": _VERSION, "dp_accounting": _VERSION},
}
TILT = {
    "features": _one_of(["default", "given"]),
    "num_axes": _COUNT,
    "l2_clip_norm": _POSITIVE,
    "rounding": _ROUNDING,
    "accepted": _FLAG,
    "effective_sample_size": _SHARE,
    "training_steps": _Kind("an integer >= 0", lambda x: _is_integer(x) and 0 <= x < 2**63),
}
_OF_ROUNDS = (
    "rounds", "most_rounds", "mu_per_round", "noise_multiplier", "geometries", "discrete_noise", "subspace",
    "subspace_dim", "precision_rank", "damping", "expected_excess_loss_per_round", "public_evidence", "dtype",
)  # fmt: skip
TILT_FIELDS = {name: kind for name, kind in FIELDS.items() if name not in _OF_ROUNDS} | {
    "schema": _one_of([TILT_SCHEMA]),
    "hardened": _Kind("false", lambda x: x is False),
    "tilt": TILT,
    "provenance": {"public_records_sha256": _SHA256},
}
DISCRETE_NOISE = {"l2_clip_norm": _COUNT, "scale": _COUNT}


def conform(value: Any, expected: Any, field: str) -> None:
    """Raises ValueError, naming the first field that is missing, unknown, or not of its kind.

    Args:
      value: of a certificate, or of a part of it.
      expected: a kind, a list of one, or a mapping of names to either.
      field: its name, for the error.
    """
    # Of a certificate from outside nothing is taken for granted: its type is looked at before anything else.
    if isinstance(expected, _Kind):
        if not expected.holds(value):
            raise ValueError(f"Certificate field {field!r}: expected {expected.words}, found {value!r}.")
    elif isinstance(expected, list):
        if not isinstance(value, list) or not value:
            raise ValueError(f"Certificate field {field!r}: expected a list of at least one entry, found {value!r}.")
        for i, entry in enumerate(value):
            conform(entry, expected[0], f"{field}[{i}]")
    else:
        if not isinstance(value, dict):
            raise ValueError(f"Certificate field {field!r}: expected a mapping, found {type(value).__name__}.")
        # In one order, so that the same certificate is refused in the same words.
        for name in sorted(set(expected) ^ set(value), key=str):
            wrong = "missing" if name in expected else "unknown"
            raise ValueError(f"Certificate field {name!r} of {field!r} is {wrong}.")
        for name, inner in expected.items():
            conform(value[name], inner, name if field == "certificate" else f"{field}.{name}")
