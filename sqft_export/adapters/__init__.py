"""Elastic sparse LoRA: the layer that replaces Linear, its ranks, its training, its files."""
