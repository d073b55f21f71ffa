"""What the reviewers of backprop with approximate activations (Chakrabarti & Moseley, 2019) asked for, one study a file."""
