"""Configurations of models, as dataclasses: typed, validated on construction, and imported without torch.

first_stage      autoencoders, KL and VQ (Table 8)
unet             the denoising network (Tables 12 to 15)
text             text transformers, trained or frozen
conditioning     classes, layouts, semantic maps, images (Table 15)
schedule         the forward process
objective        what the network predicts, and its loss
model            all parts as one model
values           building configs from plain values, with readable errors
parameter_count  the size of a network, from its configuration alone
"""
