"""Run a recipe: compute keys, skip cached passes, check gates, preview a run."""
