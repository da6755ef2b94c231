"""Estimates the steps, memory and disk space of a run without loading weights: see `plan.py`."""
