"""How far float32 arithmetic can be from real arithmetic; public, from shapes alone."""

UNIT = 2.0**-24
_BLOCK = 1024


def of_sum(num_terms: int) -> float:
    """A bound on the error of a sum of products in float32, relative to the sum of their absolute values.

    Terms are added in blocks of at most 1024, in any order, as matrix products on CPUs, GPUs and TPUs do, which hold a
    block of both factors in cache; then the blocks are added. That is an assumption on the backend, stated in the
    certificate; sums of the library's own are no longer than that.

    >>> of_sum(1024) / UNIT
    1025.0

    References:
      Higham, Accuracy and Stability of Numerical Algorithms, 2002, chapter 3.
    """
    blocks = -(-num_terms // _BLOCK)
    return (min(num_terms, _BLOCK) + blocks) * UNIT
