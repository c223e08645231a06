"""The stages of the pipeline, and what they share.

Read `recipe` (what a run is asked to do), `ledger` (what makes a result reusable), `stage` (the contract between the
two), `run` (the walk over the stages), then one package a stage: `pairs`, `autoencoder`, `latents`, `diffusion`,
`evaluate`, `export`.
"""

__version__ = "0.1.0"
