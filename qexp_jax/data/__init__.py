"""Records, units, streams and what is checked of them."""
