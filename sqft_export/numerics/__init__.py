"""Pure tensor functions: pruning masks, quantization grids, bit packing."""
