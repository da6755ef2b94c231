"""Builds a token store: plans work units on the driver, encodes them in Ray actors, publishes.

A work unit is a group of byte ranges of source files; finished units are skipped when a build
resumes. Start with `preparation.py` (the entry point), then `units.py` and `unit_encoder.py`.
"""
