"""Studies that the reviewers of "Backprop with approximate activations" (Chakrabarti & Moseley, 2019) asked for, one a file."""
