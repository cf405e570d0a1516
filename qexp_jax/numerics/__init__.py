"""Arithmetic that knows no data: exact sums of integers, bounds on rounding, keys."""
