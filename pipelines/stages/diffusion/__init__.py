"""The `diffusion` stage: the UNet and the text transformer, trained together on cached latents."""
