"""Tasks and calibration data as token ids, and how answers are scored."""
