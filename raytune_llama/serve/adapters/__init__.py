"""Adapters on a base that is served: where they lie, what they are, and which are in memory."""
