"""The model: its weights, how they are loaded, and the forward pass. Must not know requests, steps or the scheduler."""
