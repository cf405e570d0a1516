"""Numbers and options as callers give them, converted once, at each entrance.

A budget may come as a float32 scalar of NumPy or JAX, and arithmetic that stays in float32 misses it by more than a
small delta allows. So what is meant is `float(value)`, and from there on all is Python floats; counts are Python
integers. Whatever is not one number is refused with its type and shape, never with its content: a caller may have
mistaken a key or a record for a number.
"""

import decimal
import math
import numbers
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np


def real(name: str, value: Any) -> float:
    """A real number of Python, NumPy or JAX as a Python float; it may be infinite or NaN.

    >>> real("epsilon", np.float32(0.1))
    0.10000000149011612
    """
    if not _is_scalar(value, np.floating, np.integer):
        raise ValueError(f"Expected {name} to be one real number, found {described(value)}.")
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        raise ValueError(f"Expected {name} within double precision, found a larger {described(value)}.") from None
    except (TypeError, ValueError):  # a traced value, a time, a signalling NaN
        raise ValueError(f"Expected {name} to be one real number, found {described(value)}.") from None


def positive(name: str, value: Any) -> float:
    """A finite number > 0 as a Python float."""
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"Expected a finite {name} > 0, found {number}.")
    return number


def not_negative(name: str, value: Any) -> float:
    """A finite number >= 0 as a Python float."""
    number = real(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"Expected a finite {name} >= 0, found {number}.")
    return number


def proportion(name: str, value: Any) -> float:
    """A number in (0, 1) as a Python float."""
    number = real(name, value)
    if not 0 < number < 1:
        raise ValueError(f"Expected {name} in (0, 1), found {number}.")
    return number


def count(name: str, value: Any, *, least: int = 1) -> int:
    """An integer of Python, NumPy or JAX as a Python int; True is no number, and 3.0 no integer.

    >>> count("rounds", np.int64(8))
    8
    """
    if not _is_scalar(value, np.integer):
        raise ValueError(f"Expected an integer {name} >= {least}, found {described(value)}.")
    try:
        number = operator.index(value)
    except TypeError:  # a traced value, a fraction, a time
        raise ValueError(f"Expected an integer {name} >= {least}, found {described(value)}.") from None
    if number < least:
        raise ValueError(f"Expected an integer {name} >= {least}, found {number}.")
    return number


def function(name: str, value: Any) -> None:
    """Raises unless `value` is None or can be called."""
    if value is not None and not callable(value):
        raise ValueError(f"Expected {name} to be a function, found {described(value)}.")


def described(value: Any) -> str:
    """Type, dtype and shape, without the content."""
    kind = type(value).__name__
    if isinstance(value, list | tuple):
        return f"{kind} of shape ({len(value)}, ...)"
    if not hasattr(value, "dtype"):
        return f"{kind} of shape {getattr(value, 'shape', ())}"
    return f"{kind} of dtype {value.dtype} and shape {getattr(value, 'shape', ())}"


def _is_scalar(value: Any, *kinds: type) -> bool:
    """Whether it is one number: of these kinds where it has a dtype, else any real number of Python."""
    if not hasattr(value, "dtype"):
        # To Python True is an integer, and hardly ever meant as one.
        return isinstance(value, numbers.Real | decimal.Decimal) and not isinstance(value, bool)
    try:
        # Among NumPy's integers are durations, and one without a unit converts.
        is_duration = np.issubdtype(value.dtype, np.timedelta64)
        known = not is_duration and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    except TypeError:  # a dtype of another library
        return False
    # An array of shape (1,) is refused: it may be a batch that happens to have one record.
    return known and getattr(value, "shape", None) == ()
