"""The stages of the pipeline, and what they share.

Read `run/recipe` (what a run is asked to do), `store/ledger` (what makes a result reusable), `stage` (the interface
between the two), `run/walk` (the stages in order), then one package a stage: `stages/pairs`, `stages/autoencoder`,
`stages/latents`, `stages/diffusion`, `stages/evaluate`, `stages/export`.
"""

__version__ = "0.1.0"
