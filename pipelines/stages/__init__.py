"""The stages in the order of the data: pairs, autoencoder, latents, diffusion, evaluate, export.

In each package `stage` declares the stage and imports nothing heavy, `work` does the work, `config` is the stage's
section of a recipe, `artifact` is what later stages read of it, and `section` is its part of the report.
"""
