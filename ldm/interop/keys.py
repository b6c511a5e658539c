"""Every key of the configs that diffusers and transformers write, class by class: what is done with it.

A key is `used` by a reader, or `free` (it changes no number that a trained model computes), or has the `only` values that are
built here. Anything else is refused by name. tests/interop/test_keys.py walks over the classes' own signatures, so that a key
that is new there is noticed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.errors import Refusal

OFF = (None, False, [], {}, "")  # what a key that is unknown here may say: nothing


@dataclass(frozen=True)
class Keys:
    """The keys of a class, each a word."""

    used: str
    free: str = ""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def known(self) -> set[str]:
        """All of them."""
        return {*self.used.split(), *self.free.split(), *self.only}


ACTIVATION = {"act_fn": ("silu", "swish")}
RGB = {"in_channels": (3,), "out_channels": (3,), **ACTIVATION, "mid_block_add_attention": (True,)}
VAE = "down_block_types up_block_types block_out_channels layers_per_block latent_channels norm_num_groups scaling_factor"
UNET = "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block norm_num_groups"
TIME = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "norm_eps": (1e-5,),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "class_embed_type": (None,),
}
CONDITIONAL = {
    **ACTIVATION,
    **TIME,
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
PLAIN = {**ACTIVATION, **TIME, "mid_block_type": ("UNetMidBlock2D",), "num_class_embeds": (None,)}
DIT = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5,),
}
DIT_USED = "num_attention_heads attention_head_dim in_channels out_channels num_layers sample_size patch_size num_embeds_ada_norm"
OLD_DIT = {"only_cross_attention": (False,), "double_self_attention": (False,), "attention_type": ("default",)}
CLIP = {
    "hidden_act": ("gelu", "quick_gelu"),
    "layer_norm_eps": (1e-5,),
    "bos_token_id": (49406, 0),
    "eos_token_id": (49407, 2),  # what older ones say, where the largest id is the end
}
CLIP_USED = "vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads"
CLIP_USED += " max_position_embeddings architectures"
# What every config of transformers may carry, about training, writing texts and its own files.
BOOKS = """
model_type dtype torch_dtype transformers_version name_or_path return_dict output_attentions output_hidden_states torchscript
use_bfloat16 use_cache pruned_heads tie_word_embeddings is_encoder_decoder is_decoder chunk_size_feed_forward id2label label2id
problem_type pad_token_id bos_token_id eos_token_id max_length min_length num_beams num_beam_groups diversity_penalty temperature
top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
attention_dropout dropout activation_dropout initializer_factor initializer_range init_std encoder_layerdrop classifier_dropout
architectures
"""
BERT = {"activation_function": ("gelu",), "scale_embedding": (False,)}
BERT_USED = (
    "num_hidden_layers vocab_size max_position_embeddings encoder_layers encoder_ffn_dim encoder_attention_heads head_dim d_model"
)

T5_USED = "vocab_size d_model d_kv d_ff num_layers num_heads feed_forward_proj"
T5_USED += " relative_attention_num_buckets relative_attention_max_distance layer_norm_epsilon"
T5_FREE = "num_decoder_layers dropout_rate initializer_factor decoder_start_token_id task_specific_params"
T5_FREE += " scale_decoder_outputs output_past n_positions tie_encoder_decoder"
T5 = {"model_type": ("t5",), "is_gated_act": (True,), "dense_act_fn": ("gelu_new",), "pad_token_id": (0,), "eos_token_id": (1,)}

CLASSES = {
    "T5EncoderModel": Keys(T5_USED, f"{BOOKS} {T5_FREE}", T5),
    "AutoencoderKL": Keys(
        f"{VAE} shift_factor latents_mean latents_std use_quant_conv use_post_quant_conv",
        "sample_size force_upcast",
        RGB,
    ),
    "VQModel": Keys(
        f"{VAE} num_vq_embeddings vq_embed_dim",
        "sample_size force_upcast",
        {**RGB, "norm_type": ("group",), "lookup_from_codebook": (False,)},
    ),
    "UNet2DConditionModel": Keys(
        f"{UNET} only_cross_attention cross_attention_dim transformer_layers_per_block attention_head_dim num_attention_heads"
        " addition_time_embed_dim num_class_embeds projection_class_embeddings_input_dim",
        "sample_size dropout upcast_attention use_linear_projection addition_embed_type_num_heads",
        CONDITIONAL,
    ),
    "UNet2DModel": Keys(
        f"{UNET} attention_head_dim attn_norm_num_groups add_attention downsample_type upsample_type resnet_time_scale_shift",
        "sample_size dropout num_train_timesteps",
        PLAIN,
    ),
    "DiTTransformer2DModel": Keys(DIT_USED, "dropout norm_num_groups upcast_attention", DIT),
    "Transformer2DModel": Keys(DIT_USED, "dropout norm_num_groups upcast_attention use_linear_projection", {**DIT, **OLD_DIT}),
    "SD3Transformer2DModel": Keys(
        "sample_size patch_size in_channels num_layers attention_head_dim num_attention_heads joint_attention_dim out_channels"
        " caption_projection_dim pooled_projection_dim pos_embed_max_size dual_attention_layers",
        only={"qk_norm": (None, "rms_norm")},
    ),
    "FluxTransformer2DModel": Keys(
        "in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads joint_attention_dim"
        " pooled_projection_dim guidance_embeds axes_dims_rope",
        only={"patch_size": (1,)},
    ),
    "PixArtTransformer2DModel": Keys(
        "num_attention_heads attention_head_dim in_channels out_channels num_layers cross_attention_dim sample_size patch_size"
        " caption_channels interpolation_scale use_additional_conditions",
        "dropout norm_num_groups upcast_attention num_embeds_ada_norm use_linear_projection num_vector_embeds",
        {**DIT, "norm_type": ("ada_norm_single",), "norm_eps": (1e-6,), "attention_type": ("default",)},
    ),
    "CLIPTextModel": Keys(CLIP_USED, BOOKS, CLIP),
    "LDMBertModel": Keys(BERT_USED, BOOKS, BERT),
}


def check_keys(config: Mapping[str, Any], kind: str, place: str) -> None:
    """Raises ValueError where a config of the class `kind` says something that no reader uses and that is not built here."""
    keys = CLASSES[kind]
    wrong = []
    for name, value in config.items():
        if name in keys.only:
            if value not in keys.only[name]:
                wrong.append(f"{name}={value} ({' or '.join(map(str, keys.only[name]))} is known)")
        elif not name.startswith("_") and name not in keys.known() and value not in OFF:
            wrong.append(f"{name}={value} (which is unknown)")
    if wrong:
        raise Refusal(f"{place} is a {kind} with {', '.join(wrong)}; no whole model of this family has that.")
