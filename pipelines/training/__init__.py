"""Training of one network by Ray Train, shared by the first stage and the diffusion model.

Read `task` (what a network must offer to be trained), `loop` (what each worker does), then `fit` (what the driver
does). They stand on `optimization`, `loader` (batches ahead of training), `checkpoints`, `relay` (what workers tell
the driver) and `outputs` (names of the final files).
"""
