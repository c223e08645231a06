"""The networks that metrics look through, with weights given by path.

inception     FID, KID, Inception score, precision and recall
clip          CMMD, CLIP-FD, CLIP score
perceptual    LPIPS
weights       weights files read without running code, and their digests
extractors    which of them there are, and what a metric lacks without one
"""
