"""How far float32 arithmetic can be from real arithmetic; public, from shapes alone."""

UNIT = 2.0**-24
_BLOCK = 1024


def of_sum(num_terms: int, block: int = _BLOCK) -> float:
    """A bound on the error of a sum of products in float32, relative to the sum of their absolute values.

    Terms are added in blocks, in any order, then the blocks. Matrix products on CPUs, GPUs and TPUs do so, which hold a
    block of both factors in cache: of at most 1024 terms, which is an assumption on the backend, stated in the
    certificate.

    Args:
      num_terms: of the sum.
      block: at most so many of them are added one after the other.

    >>> of_sum(1024) / UNIT
    1025.0

    References:
      Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapter 3.
    """
    return (min(num_terms, block) + -(-num_terms // block)) * UNIT
