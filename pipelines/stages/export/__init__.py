"""The `export` stage: write the trained model in the layouts that other programs load."""
