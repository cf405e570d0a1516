"""How fast the hot paths are, against their parts and against other libraries; see `__main__`."""
