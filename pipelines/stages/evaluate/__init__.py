"""The `evaluate` stage: pictures for fixed prompts and seeds, and how well they show what was asked for.

Read `prompts` (what is asked for), `sampling` (a picture for each), `shapes` (reading pictures back),
`scores`, `stage`.
"""
