"""Native kernels that multiply directly from mask and packed codes. No torch."""
