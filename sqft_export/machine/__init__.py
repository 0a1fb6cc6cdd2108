"""Processors, memory, accelerators, launchers and the terminal of this machine."""
