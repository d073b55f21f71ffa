"""`fewbit bench`: activations, and training steps of models, exact and coded side by side."""
