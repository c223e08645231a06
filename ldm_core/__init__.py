"""Latent diffusion as plain modules and functions on tensors: Rombach et al., CVPR 2022.

Read beside Section 3 of the paper, in this order:

    autoencoder       3.1  perceptual compression: KL and VQ first stages (blocks, attention: their parts)
    posterior              what an image is encoded to (vector_quantizer: the codebook; tiling: images beyond memory)
    schedule          3.2  the forward process: noise added to latents
    objective         3.2  what the network predicts, and the loss, Eq. (2) and (3)
    unet              3.2  the denoising network
    conditioning      3.3  captions, classes, layouts, maps and images to what the UNet takes
    text_transformer  3.3  the encoder of captions that is trained jointly (tokenizer: captions to ids)
    pretrained        3.3  frozen ones: clip_text, or any of the transformers library
    samplers               from noise to latents: DDPM, DDIM, PLMS, DPM-Solver++, UniPC; image-to-image, masked
    guidance               classifier-free and image guidance around a sampler's denoiser
    ema                    the averaged weights that are sampled from
    latent_diffusion       the parts as one model
    presets                the published models by name
    checkpoint             a model as a folder (checkpoint_formats: CompVis's and diffusers')
    likelihood             the variational bound in bits per dimension
    metrics                FID, KID, Inception score, precision and recall, CMMD, CLIP score, PSNR, SSIM, LPIPS

docs/api.md shows them in use.

    >>> from ldm_core import presets, load, samplers
    >>> model = presets.get("txt2img-1p4b").build(device="meta")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_core.checkpoint import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing one module does not import all of them.
    if name == "load":
        from ldm_core.checkpoint import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
