"""The `diffusion` stage: the UNet and the network of its condition, trained together on cached latents."""
