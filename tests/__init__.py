"""A real package, so that no `tests` of an installed distribution (torch-fidelity ships one) is found in its place."""
