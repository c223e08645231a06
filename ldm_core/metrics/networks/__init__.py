"""The networks behind the metrics, with weights given by path.

    inception     FID, KID, Inception score, precision and recall
    clip          CMMD, CLIP-FD, CLIP score
    lpips         LPIPS
    weights       reads and digests weights files, without running code from them
    extractors    the paths, and what a metric lacks if its network cannot be loaded

What others keep well is theirs: the Inception graph (torch-fidelity), VGG-16 and AlexNet (torchvision), LPIPS's learned
weights (torchmetrics), CLIP (transformers, open_clip). Each library is imported when a metric asks for it.
"""
