"""Running a recipe: keys, skipping, sealing, several processes."""
