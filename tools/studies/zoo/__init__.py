"""A zoo of models from several packages, exact and coded: `python -m tools.studies.zoo`, see `__main__.py`."""
