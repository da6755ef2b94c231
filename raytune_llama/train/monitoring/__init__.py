"""Monitoring of a run: metrics, logging, loss spikes, non-finite steps, self-tests.

Read `reporter.py` first: the loop calls it after every step, and it writes metrics and incidents.
"""
