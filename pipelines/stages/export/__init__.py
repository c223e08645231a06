"""The `export` stage: the trained model in the layouts that other programs load."""
