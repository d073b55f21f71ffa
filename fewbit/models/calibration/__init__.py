"""Tables for a model's own pre-activations, and bits for each of its layers."""
