"""Whether gradients from codes are good enough, before training and during it."""
