"""Existing private fine-tuning that the benchmark compares with."""
