"""autograd functions, one file for each operation. They take plain tensors and know no registry."""
