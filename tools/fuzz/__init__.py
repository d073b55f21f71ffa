"""Random networks, exact and coded side by side: `python -m tools.fuzz 1000`, see `__main__.py`."""
