"""The `autoencoder` stage: train a first stage on the pairs, or take a pretrained one from a file.

Read `reconstruction` (loss and measure), `learner` (the training task), `stage`; `artifact` is how later stages read
the result.
"""
