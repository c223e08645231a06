"""The `evaluate` stage: sample pictures for fixed prompts and seeds, and score how well they show what was asked for.

Read `prompts` (what to sample), `batch` (an actor's work), `stage`. `shapes` is a guest: a detector of coloured shapes,
used only if a recipe asks for it.
"""
