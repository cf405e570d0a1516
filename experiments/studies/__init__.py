"""Other experiments, each with its own command."""
