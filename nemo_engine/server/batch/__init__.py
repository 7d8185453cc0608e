"""Batches: lines of a file through the routes, and ``/v1/files`` and ``/v1/batches``."""
