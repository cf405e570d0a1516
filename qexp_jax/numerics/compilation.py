"""Compilation of programs on few numbers, which takes longer than they ever run."""

import functools
from collections.abc import Callable
from typing import Any

import jax

_UNOPTIMISED = {"xla_backend_optimization_level": 0}


def jit_quickly(
    function: Callable[..., Any], static_argnums: tuple[int, ...] = (), most_numbers: int = 2**22
) -> Callable[..., Any]:
    """`jax.jit`, on CPUs without LLVM's optimisations where the arguments are few numbers.

    A process compiles such a program once and runs it a few dozen times: without optimisations it compiles in a third
    of the time. Inside of another program it is a part of that one.

    Args:
      function: of positional arguments.
      static_argnums: see `jax.jit`.
      most_numbers: that all arguments together may hold.
    """
    optimised = jax.jit(function, static_argnums=static_argnums)
    quick = jax.jit(function, static_argnums=static_argnums, compiler_options=_UNOPTIMISED)

    @functools.wraps(function)
    def call(*args):
        # Of shapes and of the platform alone.
        leaves = jax.tree.leaves(args)
        is_part = any(isinstance(x, jax.core.Tracer) for x in leaves)
        num_numbers = sum(getattr(x, "size", 1) for x in leaves)
        is_quick = jax.default_backend() == "cpu" and not is_part and num_numbers <= most_numbers
        return quick(*args) if is_quick else optimised(*args)

    return call
