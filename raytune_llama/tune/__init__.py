"""Search space to the best run."""
