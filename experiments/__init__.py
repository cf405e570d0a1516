"""Experiments with qexp_jax: data, models, and one script per figure."""
