"""Names of CLIP's text weights in files of the transformers library."""

from __future__ import annotations

from torch import nn

from ldm_core.networks.clip_text import ClipTextLayer, ClipTextTransformer
from ldm_core.weights.name_mapping import Children

# As the library wrote them before its version 5; it reads both.
CLIP_TEXT_TABLE: dict[type[nn.Module], Children] = {
    ClipTextTransformer: {
        "token_embedding": "embeddings.token_embedding",
        "position_embedding": "embeddings.position_embedding",
        "layers": "encoder.layers",
        "norm_out": "final_layer_norm",
    },
    ClipTextLayer: {
        "norm1": "layer_norm1",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
    },
}


def current_clip_name(name: str) -> str | None:
    """Return a text weight's name before version 5, whichever version wrote it; None for the one buffer."""
    inner = name.removeprefix("text_model.")
    return None if inner == "embeddings.position_ids" else f"text_model.{inner}"
