"""Checks of a recipe before it runs: its faults, and the predicted cost of every pass."""
