"""Loaders: what is public, what is private, and how clinical tables become records."""
