"""Document filters: cleaning rules per text, and exact and near deduplication over all documents.

Deduplication runs as numbered tasks on Ray Data (`tasks.py`) that shuffle files (`shuffle.py`).
Start with `cleaning.py` for the rules, and with `duplicates.py` for deduplication.
"""
