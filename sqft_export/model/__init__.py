"""Checkpoints on disk: their structure, their tensors, and the files that passes add."""
