"""Native kernels that multiply straight from mask and packed codes. No torch."""
