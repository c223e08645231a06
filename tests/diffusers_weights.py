"""A network's weights under diffusers' names, for the parity tests and the benchmarks."""

from torch import Tensor, nn

from ldm_core.checkpoint_formats.diffusers.names import FIRST_STAGE_TABLE, TEXT_TRANSFORMER_TABLE, UNET_TABLE
from ldm_core.networks.autoencoder import AutoencoderKL, VQAutoencoder
from ldm_core.networks.text_transformer import TextTransformer
from ldm_core.networks.unet import UNet
from ldm_core.weights.name_mapping import entries, to_theirs

TABLES = {
    UNet: UNET_TABLE,
    AutoencoderKL: FIRST_STAGE_TABLE,
    VQAutoencoder: FIRST_STAGE_TABLE,
    TextTransformer: TEXT_TRANSFORMER_TABLE,
}


def diffusers_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that the class of diffusers which computes the same network loads."""
    return to_theirs(entries(network, TABLES[type(network)]), network.state_dict())
