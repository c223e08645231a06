"""Configurations of models, as dataclasses: typed, validated where they are made, and imported without torch.

first_stage    autoencoders, KL and VQ (Table 8)          conditioning   classes, layouts, maps, images (Table 15)
unet           the denoising network (Tables 12 to 15)    schedule       the forward process
text           text transformers, trained or frozen       objective      what the network predicts, and the loss
model          the parts as one model                     values         from plain values, with readable errors
"""
