"""The route ``/v1/responses``: its input, its output and its stream."""
