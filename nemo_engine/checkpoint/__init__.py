"""Checkpoints: where they are, what they hold, how their tensors are loaded, quantised and written."""
