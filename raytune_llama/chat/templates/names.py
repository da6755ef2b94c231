"""The names of the templates, for configs that must not import what writes them."""
