"""Weight files that sparsity shrinks, and loaders that inflate them in memory. No torch."""
