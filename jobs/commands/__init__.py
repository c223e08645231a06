"""The commands of `ldm`, one module each; `cluster_jobs` has three."""
