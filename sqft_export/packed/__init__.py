"""Packed weight files, which store pruned weights in fewer bytes, and their loaders. No torch."""
