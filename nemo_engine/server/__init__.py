"""An OpenAI-compatible HTTP server over ``AsyncEngine``: routes, protocols, access, metrics, and a page to watch it.

Knows the engine by its public face alone: no scheduler, runner, model or tensors.
"""
