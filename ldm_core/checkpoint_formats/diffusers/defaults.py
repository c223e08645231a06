"""Defaults of diffusers (0.42) and transformers for settings that a config.json leaves out, as older files do.

Most have no counterpart in our networks, which compute what the default says: any other value is refused on import.
"""

from __future__ import annotations

from typing import Any

UNET_COMMON: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "sample_size": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}

UNET_2D_CONDITION: dict[str, Any] = UNET_COMMON | {
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_head_dim": 8,
    "attention_type": "default",
    "block_out_channels": [320, 640, 1280, 1280],
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 1280,
    "cross_attention_norm": None,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "in_channels": 4,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": False,
    "use_linear_projection": False,
}

UNET_2D: dict[str, Any] = UNET_COMMON | {
    "add_attention": True,
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "downsample_type": "conv",
    "in_channels": 3,
    "mid_block_type": "UNetMidBlock2D",
    "num_train_timesteps": None,
    "out_channels": 3,
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "upsample_type": "conv",
}

AUTOENCODER_COMMON: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"],
}

AUTOENCODER_KL: dict[str, Any] = AUTOENCODER_COMMON | {
    "force_upcast": True,
    "latent_channels": 4,
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}

VQ_MODEL: dict[str, Any] = AUTOENCODER_COMMON | {
    "force_upcast": False,
    "latent_channels": 3,
    "lookup_from_codebook": False,
    "norm_type": "group",
    "num_vq_embeddings": 256,
    "vq_embed_dim": None,
}

LDM_BERT: dict[str, Any] = {
    "activation_function": "gelu",
    "d_model": 1280,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "head_dim": 64,
    "max_position_embeddings": 77,
    "scale_embedding": False,
    "vocab_size": 30_522,
}

CLIP_TEXT: dict[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "vocab_size": 49_408,
}

SCHEDULER: dict[str, Any] = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}

# In a text model's file: of training, of other uses of the library, of who wrote it when.
TEXT_MODEL_IGNORED = (
    *("activation_dropout", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward"),
    *("classifier_dropout", "dropout", "dtype", "encoder_layerdrop", "eos_token_id", "id2label", "init_std"),
    *("initializer_factor", "initializer_range", "is_encoder_decoder", "label2id", "model_type", "num_hidden_layers"),
    *("output_attentions", "output_hidden_states", "pad_token_id", "projection_dim", "return_dict", "torch_dtype"),
    *("transformers_version", "use_cache"),
)
# Of precision and memory, not of what is computed.
AUTOENCODER_IGNORED = ("force_upcast",)
