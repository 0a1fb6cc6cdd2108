"""Run a recipe: compute keys, skip cached passes, seal artifacts, coordinate processes."""
