"""Measurements of the engine beside its peers; see README.md."""
