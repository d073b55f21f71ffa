"""autograd functions, one file per kind of saved quantity. They take plain tensors and know no registry."""
