"""Weight files that zeros make smaller, and their loaders; imports no torch."""
