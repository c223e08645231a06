"""The networks: tensors in, tensors out.

blocks, attention                             building blocks of the autoencoders and the UNet
autoencoder, posterior, vector_quantizer      first stages (Sec. 3.1)
unet                                          the denoising network (Sec. 3.2)
text_transformer, clip_text                   caption encoders (Sec. 3.3)
ids                                           range checks for ids that index an embedding
"""
