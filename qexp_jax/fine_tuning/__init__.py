"""One call: checks, rounds, checkpoints, and the tilt before them."""
