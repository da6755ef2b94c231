"""Stage 2, token store to checkpoints and an adapter."""
