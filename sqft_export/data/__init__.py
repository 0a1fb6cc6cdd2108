"""Data of tasks and calibration as token ids, and the scoring of answers."""
