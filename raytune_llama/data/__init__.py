"""Stage 1, corpora to a token store, and the order in which training reads it."""
