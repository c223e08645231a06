"""Latent diffusion as plain modules and functions on tensors: Rombach et al., CVPR 2022.

Read beside Section 3 of the paper, in this order:

    networks/autoencoder       3.1  perceptual compression: KL and VQ first stages (blocks, attention: their parts)
    networks/posterior              what an image is encoded to (vector_quantizer: the codebook)
    schedule                   3.2  the forward process: noise added to latents
    objective                  3.2  what the network predicts, and the loss, Eq. (2) and (3)
    networks/unet              3.2  the denoising network
    conditioning               3.3  captions, classes, layouts, maps and images as the UNet takes them
    networks/text_transformer  3.3  the caption encoder that is trained with the UNet (tokenizers: captions to ids)
    pretrained                 3.3  frozen caption encoders: CLIP, or any of the transformers library
    samplers                        from noise to latents: DDPM, DDIM, PLMS, DPM-Solver++, UniPC; editing
    guidance                        classifier-free and image guidance around a sampler's denoiser
    latent_diffusion                the parts as one model (prepare: fast on the device it is on)
    configs, presets                its configuration; the published ones by name
    checkpoint                      a model as a folder (checkpoint_formats: CompVis's and diffusers')
    ema, tiling, likelihood         averaged weights; images beyond memory; the variational bound in bits per dimension
    metrics                         FID, KID, Inception score, precision and recall, CMMD, CLIP score, PSNR, SSIM, LPIPS

docs/api.md shows them in use.

    >>> from ldm_core import presets, load, samplers
    >>> model = presets.get("txt2img-1p4b").build(device="meta")
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ldm_core.latent_diffusion import LatentDiffusion

__all__ = ["load"]


def load(folder: str | Path, *, device: "torch.device | str | None" = None) -> "LatentDiffusion":
    """Read a model from a folder that training, `ldm import` or `checkpoint.save` wrote.

    Args:
        folder: holds model.safetensors (or its shards) and config.json.
        device: where to put the weights; None is torch's default device.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, or the weights are not those of the config; names the tensors.
    """
    # Imported on call: recipes and `ldm --help` import this package, and must not wait for torch.
    from ldm_core import checkpoint

    return checkpoint.load(folder, device=device)
