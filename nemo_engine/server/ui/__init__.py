"""The web page at ``/``, and the numbers that it shows."""
