"""Measure and compare the latency, accuracy, memory and energy of models."""
