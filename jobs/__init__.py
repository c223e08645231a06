"""Everything that a person or a cluster starts: the `ldm` command, its recipes, the demo."""
