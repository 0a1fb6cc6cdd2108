"""What is on disk: checkpoints, their structure, and what passes add to them."""
