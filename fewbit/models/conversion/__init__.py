"""Conversion: models, or the functions that code calls, keep codes."""
