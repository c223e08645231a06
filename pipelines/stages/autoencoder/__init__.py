"""The `autoencoder` stage: a first stage trained on the pairs, or taken from a file."""
