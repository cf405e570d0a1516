"""How the library's programs are compiled: of a first release nearly all seconds are compilation.

On CPUs each operation that XLA fuses is written by its older emitters, which take half of the time that the newer ones
take, for programs that are as fast. Programs on few numbers, which run a few dozen times, do without LLVM's
optimisations as well. Accelerators compile as they do.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

FEW = 2**22  # numbers, of which an operation takes milliseconds however it is compiled
_OLDER_EMITTERS = {"xla_cpu_use_fusion_emitters": False}
_UNOPTIMISED = {"xla_backend_optimization_level": 0}


def compiled(function: Callable[..., Any], *, few: int = 0, **static: Any) -> Any:
    """`jax.jit` of a program that is compiled by itself. Where an argument is traced it is a part of another one.

    What others call with numbers of their own while they are traced has to be a plain `jax.jit`.

    Args:
      function: what is compiled.
      few: numbers that all arguments together may hold where it is compiled without LLVM's optimisations.
      **static: `static_argnums` or `static_argnames` of `jax.jit`.
    """
    jit = functools.partial(jax.jit, function, **static)
    part = jit()
    whole = functools.cache(lambda is_small: jit(compiler_options=_options(is_small)))

    @functools.wraps(function)
    def call(*args, **kwargs):
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return part(*args, **kwargs)
        # Of shapes alone.
        num_numbers = sum(getattr(x, "size", 1) for x in leaves)
        return whole(num_numbers <= few)(*args, **kwargs)

    call.lower = lambda *args, **kwargs: whole(False).lower(*args, **kwargs)  # type: ignore[attr-defined]
    call.eval_shape = part.eval_shape  # type: ignore[attr-defined]
    return call


def _options(is_small: bool) -> dict[str, Any]:
    if jax.default_backend() != "cpu":
        return {}
    options = _OLDER_EMITTERS | (_UNOPTIMISED if is_small else {})
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    """Whether this version of XLA has the option: they come and go."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
