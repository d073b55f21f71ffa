"""Compare random networks, exact and coded: `python -m tools.fuzz 1000`, see `__main__.py`."""
