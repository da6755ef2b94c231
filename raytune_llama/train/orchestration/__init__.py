"""Runs the loop on Ray Train: launch, supervision, restarts and elastic scaling.

Read `launch.py` (the driver) first, then `worker.py` (each worker's entry point). The driver's
`supervisor.py` reads heartbeats through `channel.py`, finds stalls, and replaces workers;
`failure_policy.py` decides on retries.
"""
