"""Every latency, accuracy, memory and energy figure."""
