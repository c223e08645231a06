"""Training of one network by Ray Train, shared by the first stage and the diffusion model.

Read `task` (what a network must offer to be trained), `loop` (what each worker does), then `fit` (what the driver
does). `randomness`, `prefetch`, `checkpoint` and `relay` are what these stand on.
"""
