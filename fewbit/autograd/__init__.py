"""Autograd functions, one file for each operation. They take plain tensors and do not depend on the registry."""
