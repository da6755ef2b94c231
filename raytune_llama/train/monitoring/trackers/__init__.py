"""Trackers: MLflow and W&B, to which the driver sends what a run writes to its directory.

Read `feed.py` first: it follows `metrics.jsonl`, so that no training process knows of a tracker and
nothing that a tracker does, or fails to do, reaches a step. What is logged is in `description.py`.
"""
