"""The networks: tensors in, tensors out.

blocks, attention                             what both the autoencoders and the UNet are made of
autoencoder, posterior, vector_quantizer      first stages (Sec. 3.1)
unet                                          the denoising network (Sec. 3.2)
text_transformer, clip_text                   encoders of captions (Sec. 3.3)
ids                                           range checks of what indexes an embedding
"""
