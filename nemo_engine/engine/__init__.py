"""The engine: what users call, what runs the steps, and what turns requests into tokens and tokens into answers."""
