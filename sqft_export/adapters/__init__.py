"""Elastic sparse LoRA: the layer that replaces Linear, its ranks, training and files."""
