"""To let a model, or the functions that any code calls, keep codes."""
