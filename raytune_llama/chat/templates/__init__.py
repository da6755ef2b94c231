"""How conversations are written for a model, one form a module."""
