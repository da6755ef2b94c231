"""Base and adapters become one model directory."""
