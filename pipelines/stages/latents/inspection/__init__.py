"""A few samples of the latents, looked into: for `ldm inspect` and for `ldm verify`."""
