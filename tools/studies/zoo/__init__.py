"""Families of models, exact and coded: `python -m tools.studies.zoo`, see `__main__.py`."""
