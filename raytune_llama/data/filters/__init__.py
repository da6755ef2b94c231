"""Which documents are kept: cleaning rules on one text, and exact and near deduplication over all.

Deduplication runs as numbered tasks on Ray Data (`tasks.py`) that shuffle files (`shuffle.py`).
Start with `cleaning.py` for the rules, and with `duplicates.py` for deduplication.
"""
