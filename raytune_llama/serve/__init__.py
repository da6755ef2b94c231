"""A model directory to an endpoint."""
