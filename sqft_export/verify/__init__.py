"""Certify a run: the trained model is the merged, the stored and the executed model."""
