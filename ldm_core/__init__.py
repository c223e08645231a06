"""Latent diffusion as plain modules and functions on tensors: Rombach et al., CVPR 2022.

Read beside Section 3 of the paper, in this order:

    networks/autoencoder       3.1  perceptual compression: KL and VQ first stages (blocks, attention: their parts)
    networks/posterior              what an image is encoded to (vector_quantizer: the codebook)
    schedule                   3.2  the forward process: noise added to latents, by a chain or a rectified flow
    objective                  3.2  what the network predicts, and the loss, Eq. (2) and (3) (timesteps: t in training)
    networks/unet              3.2  the denoising network
    conditioning               3.3  captions, classes, layouts, maps and images as the UNet takes them
    networks/text_transformer  3.3  the caption encoder that is trained with the UNet (tokenizers: captions to ids)
    pretrained                 3.3  frozen caption encoders: CLIP, or any of the transformers library
    samplers                        from noise to latents: DDPM, DDIM, PLMS, Euler, Heun, DPM-Solver++, UniPC; editing
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
    from ldm_core.tokenizers.joined import AnyTokenizer

__all__ = ["load", "load_tokenizer"]


def load(
    source: str | Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    device: "torch.device | str | None" = None,
) -> "LatentDiffusion":
    """Read a model: from a folder of ours, a checkpoint of the paper's code release, or a folder of diffusers.

    Nothing in the files is run. Weights come one by one: float32 on the CPU stays in the file's pages until it is
    changed, so leave the file as it is while the model lives.

    Args:
        source: a folder that training, `ldm import` or `checkpoint.save` wrote, or that diffusers did; a file of the
            release, .ckpt or .safetensors, or a folder with it. Content decides, not names. Averaged weights are taken
            if a checkpoint has them.
        preset: name of the model in a file of the release; None takes the configuration beside it (model.yaml beside
            model.ckpt, or config.yaml if no other checkpoint is there), or infers the preset from names and shapes of
            the weights, which cannot tell the number of attention heads.
        config: configuration to use instead: a YAML file as the release has it, or a config.json of ours.
        device: where to put the weights; None is torch's default device.

    Returns:
        The model in evaluation mode, its weights float32.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: a file is damaged, unknown, not what it is said to be, or holds a first stage alone; or the weights
            are not those of the configuration; names the tensors.
    """
    # Imported on call: recipes and `ldm --help` import this package, and must not wait for torch.
    from ldm_core.checkpoint_formats import importing

    return importing.load(source, preset=preset, config=config, device=device)


def load_tokenizer(
    source: str | Path, *, preset: str | None = None, config: str | Path | None = None
) -> "AnyTokenizer":
    """Read the captions' tokenizer of what `load` reads: the one in the folder or beside the file.

    Without one, CLIP's as OpenAI published it is taken for a model with its vocabulary, from the open_clip package.

    Raises:
        FileNotFoundError: as `load`; or a folder of ours holds none.
        ValueError: as `load`; or there is none, or the model takes no captions.
    """
    from ldm_core.checkpoint_formats import importing

    return importing.load_tokenizer(source, preset=preset, config=config)
