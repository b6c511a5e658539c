"""Every key of the configs that diffusers and transformers write, class by class: what is done with it.

A key is `used` by a reader, or `free` (it changes no number that a trained model computes), or has the `only` values that are
built here. Anything else is refused by name. tests/interop/test_keys.py walks over the classes' own signatures, so that a key
that is new there is noticed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.errors import Refusal
from ldm.interop.weights import WHOLE

OFF = (None, False, [], {}, "")  # what a key that is unknown here may say: nothing


def whole(value: Any) -> bool:
    """Whether a setting is a whole number above 0, and no switch."""
    return type(value) is int and value > 0


def real(value: Any) -> bool:
    """Whether a setting is a number, and no switch."""
    return type(value) in (int, float) and math.isfinite(value)


def each(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A list of such settings, with something in it."""
    return lambda value: isinstance(value, list | tuple) and bool(value) and all(map(kind, value))


# What a key must hold, in words, by the keys that must; `none` are those that may say null.
FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a whole number above 0": (
        whole,
        """in_channels out_channels latent_channels norm_num_groups attn_norm_num_groups num_vq_embeddings vq_embed_dim
        num_class_embeds projection_class_embeddings_input_dim addition_time_embed_dim num_attention_heads num_layers patch_size
        num_embeds_ada_norm sample_size vocab_size hidden_size intermediate_size projection_dim num_hidden_layers
        max_position_embeddings encoder_layers encoder_ffn_dim encoder_attention_heads head_dim d_model layers_per_block
        attention_head_dim cross_attention_dim encoder_hidden_size encoder_patch_size encoder_num_hidden_layers
        encoder_input_size decoder_hidden_size decoder_num_hidden_layers decoder_num_attention_heads decoder_intermediate_size
        image_size""",
    ),
    "whole numbers above 0 in a list": (each(whole), "block_out_channels"),
    "words in a list": (each(lambda x: isinstance(x, str)), "down_block_types up_block_types"),
    "a whole number, or several in a list": (
        lambda x: x == 0 or whole(x) or each(lambda i: i == 0 or whole(i))(x),
        "transformer_layers_per_block",
    ),
    "true or false, or several in a list": (
        lambda x: type(x) is bool or each(lambda i: type(i) is bool)(x),
        "only_cross_attention",
    ),
    "true or false": (lambda x: type(x) is bool, "add_attention"),
    "a number above 0": (lambda x: real(x) and x > 0, "scaling_factor"),
    "a number": (real, "shift_factor noise_tau"),
    "numbers in a list": (each(real), "latents_mean latents_std"),
}
LISTED = "layers_per_block attention_head_dim num_attention_heads cross_attention_dim".split()  # of UNet2DConditionModel alone
NONE = """
attn_norm_num_groups vq_embed_dim num_class_embeds projection_class_embeddings_input_dim addition_time_embed_dim shift_factor
latents_mean latents_std
""".split()
NULLS = {"UNet2DModel": "attention_head_dim", "UNet2DConditionModel": "num_attention_heads", "CLIPTextModel": "projection_dim"}
NULLS["AutoencoderRAE"] = "image_size"
NULLS |= {f"{name}Transformer2DModel": "out_channels" for name in ("", "DiT", "SD3", "Flux", "PixArt")}


@dataclass(frozen=True)
class Keys:
    """The keys of a class, each a word; `means` is what the class takes for used ones that a config does not say."""

    used: str
    free: str = ""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    means: Mapping[str, Any] = field(default_factory=dict)

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

# What the classes mean where a config does not say it, but for the blocks themselves, which must be said.
STAGE = {"layers_per_block": 1, "norm_num_groups": 32, "scaling_factor": 0.18215}
NET = {"layers_per_block": 2, "norm_num_groups": 32, "attention_head_dim": 8, "num_class_embeds": None}
TOLD = {
    "only_cross_attention": False,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "addition_embed_type": None,
}
TOLD |= {"num_attention_heads": None, "addition_time_embed_dim": None, "projection_class_embeddings_input_dim": None}
SEEN = {"attn_norm_num_groups": None, "add_attention": True, "downsample_type": "conv", "upsample_type": "conv"}
SEEN |= {"resnet_time_scale_shift": "default"}
DIT_MEANS = {"in_channels": 4, "out_channels": None, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000}
SD3_MEANS: dict[str, Any] = {"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16}
SD3_MEANS |= {"joint_attention_dim": 4096, "caption_projection_dim": 1152, "pooled_projection_dim": 2048}
SD3_MEANS |= {"pos_embed_max_size": 96, "dual_attention_layers": ()}
FLUX_MEANS: dict[str, Any] = {"in_channels": 64, "out_channels": None, "num_single_layers": 38, "joint_attention_dim": 4096}
FLUX_MEANS |= {"pooled_projection_dim": 768, "guidance_embeds": False, "axes_dims_rope": (16, 56, 56), "patch_size": 1}
PIXART_MEANS: dict[str, Any] = {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 1152, "sample_size": 128}
PIXART_MEANS |= {"patch_size": 2, **dict.fromkeys(("caption_channels", "interpolation_scale", "use_additional_conditions"))}
CLIP_MEANS = {"vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 512, "hidden_act": "quick_gelu"}
CLIP_MEANS |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
VISION_USED = "hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads image_size patch_size"
VISION: dict[str, tuple[Any, ...]] = {k: v for k, v in CLIP.items() if k != "eos_token_id"} | {"num_channels": (3,)}
VISION_MEANS = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512, "num_hidden_layers": 12}
VISION_MEANS |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"}
# Of tokenizers: what cuts words and what fills up; and what is told about their files, or to calls.
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = "tokenizer_class pad_token model_max_length added_tokens_decoder additional_special_tokens extra_special_tokens"
CUT: dict[str, tuple[Any, ...]] = {
    "padding_side": ("right",),
    "truncation_side": ("right",),
    "split_special_tokens": (False,),
    "auto_map": (None,),
}
NO_WORDS = dict.fromkeys(("cls_token", "sep_token", "mask_token"), (None,))
BERT_WORDS = {f"{name}_token": (f"[{name.upper()}]",) for name in ("unk", "sep", "pad", "cls", "mask")}
BERT_WORDS |= {"strip_accents": (None, True), "tokenize_chinese_chars": (True,), "never_split": (None, [])}
BERT_WORDS |= {"do_basic_tokenize": (True,), "additional_special_tokens": (None, []), "extra_special_tokens": (None, [], {})}
FILES = """
vocab merges vocab_file merges_file tokenizer_file special_tokens_map_file name_or_path use_fast backend is_local processor_class
local_files_only device_map errors clean_up_tokenization_spaces model_input_names chat_template max_length stride padding
truncation truncation_strategy pad_to_multiple_of pad_token_type_id return_tensors legacy add_bos_token add_eos_token
model_specific_special_tokens
"""
ALWAYS = "do_lower_case"  # what published configs of CLIP's say, and its class does whatever it is told
T5_USED = "vocab_size d_model d_kv d_ff num_layers num_heads feed_forward_proj"
T5_USED += " relative_attention_num_buckets relative_attention_max_distance layer_norm_epsilon"
T5_FREE = "num_decoder_layers dropout_rate initializer_factor decoder_start_token_id task_specific_params"
T5_FREE += " scale_decoder_outputs output_past n_positions tie_encoder_decoder"
T5 = {"model_type": ("t5",), "is_gated_act": (True,), "dense_act_fn": ("gelu_new",), "pad_token_id": (0,), "eos_token_id": (1,)}
RAE_MEANS: dict[str, Any] = {"encoder_type": "dinov2", "encoder_hidden_size": 768, "encoder_patch_size": 14}
RAE_MEANS |= {"encoder_num_hidden_layers": 12, "encoder_input_size": 224, "decoder_hidden_size": 512}
RAE_MEANS |= {"decoder_num_hidden_layers": 8, "decoder_num_attention_heads": 16, "decoder_intermediate_size": 2048}
RAE_MEANS |= {"patch_size": 16, "image_size": None, "noise_tau": 0.0, "scaling_factor": 1.0}

CLASSES = {
    "T5EncoderModel": Keys(T5_USED, f"{BOOKS} {T5_FREE}", T5),
    "AutoencoderKL": Keys(
        f"{VAE} shift_factor latents_mean latents_std use_quant_conv use_post_quant_conv",
        "sample_size force_upcast",
        RGB,
        {**STAGE, "latent_channels": 4, "shift_factor": None, "latents_mean": None, "latents_std": None}
        | dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), True),
    ),
    "VQModel": Keys(
        f"{VAE} num_vq_embeddings vq_embed_dim",
        "sample_size force_upcast",
        {**RGB, "norm_type": ("group",), "lookup_from_codebook": (False,)},
        {**STAGE, "latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None},
    ),
    "AutoencoderRAE": Keys(
        " ".join(name for name in RAE_MEANS if name != "encoder_type"),
        "encoder_norm_mean encoder_norm_std latents_mean latents_std use_encoder_loss",  # tensors say the first four
        {"encoder_type": ("dinov2", "siglip2", "mae"), "num_channels": (3,), "reshape_to_2d": (True,)},
        RAE_MEANS,
    ),
    "UNet2DConditionModel": Keys(
        f"{UNET} only_cross_attention cross_attention_dim transformer_layers_per_block attention_head_dim num_attention_heads"
        " addition_time_embed_dim num_class_embeds projection_class_embeddings_input_dim",
        "sample_size dropout upcast_attention use_linear_projection addition_embed_type_num_heads",
        CONDITIONAL,
        {**NET, "in_channels": 4, "out_channels": 4, **TOLD},
    ),
    "UNet2DModel": Keys(
        f"{UNET} attention_head_dim attn_norm_num_groups add_attention downsample_type upsample_type resnet_time_scale_shift",
        "sample_size dropout num_train_timesteps",
        PLAIN,
        {**NET, "in_channels": 3, "out_channels": 3, **SEEN},
    ),
    "DiTTransformer2DModel": Keys(DIT_USED, "dropout norm_num_groups upcast_attention", DIT, DIT_MEANS),
    "Transformer2DModel": Keys(
        DIT_USED, "dropout norm_num_groups upcast_attention use_linear_projection", {**DIT, **OLD_DIT}, DIT_MEANS
    ),
    "SD3Transformer2DModel": Keys(
        "sample_size patch_size in_channels num_layers attention_head_dim num_attention_heads joint_attention_dim out_channels"
        " caption_projection_dim pooled_projection_dim pos_embed_max_size dual_attention_layers",
        only={"qk_norm": (None, "rms_norm")},
        means=SD3_MEANS,
    ),
    "FluxTransformer2DModel": Keys(
        "in_channels out_channels num_layers num_single_layers attention_head_dim num_attention_heads joint_attention_dim"
        " pooled_projection_dim guidance_embeds axes_dims_rope",
        only={"patch_size": (1,)},
        means=FLUX_MEANS,
    ),
    "PixArtTransformer2DModel": Keys(
        "num_attention_heads attention_head_dim in_channels out_channels num_layers cross_attention_dim sample_size patch_size"
        " caption_channels interpolation_scale use_additional_conditions",
        "dropout norm_num_groups upcast_attention num_embeds_ada_norm use_linear_projection num_vector_embeds",
        {**DIT, "norm_type": ("ada_norm_single",), "norm_eps": (1e-6,), "attention_type": ("default",)},
        PIXART_MEANS,
    ),
    "CLIPTextModel": Keys(CLIP_USED, BOOKS, CLIP, CLIP_MEANS),
    "CLIPVisionModelWithProjection": Keys(VISION_USED, BOOKS, VISION, VISION_MEANS),
    "LDMBertModel": Keys(BERT_USED, BOOKS, BERT),
    "CLIPTokenizer": Keys(
        WORDS, f"{FILES} {ALWAYS}", {**CUT, "bos_token": (BEGIN,), "eos_token": (END,), "unk_token": (END,), **NO_WORDS}
    ),
    "BertTokenizer": Keys(
        "do_lower_case", f"{FILES} model_max_length tokenizer_class bos_token eos_token", {**CUT, **BERT_WORDS}
    ),
}


def check_keys(config: Mapping[str, Any], kind: str, place: str) -> dict[str, Any]:
    """A config of the class `kind`, with what the class means where it is silent.

    Raises:
        Refusal: it lacks what must be said, or says something that no reader uses and that is not built here, or of another kind.
    """
    if quantised := config.get("quantization_config"):
        raise Refusal(f"{place} is quantised (quantization_config={quantised}). {WHOLE}")
    keys, wrong = CLASSES[kind], []
    whole_config = {**keys.means, **config}
    for name, value in whole_config.items():
        if name in keys.only:
            if not any(value == only and type(value) in (type(only), int, float) for only in keys.only[name]):
                wrong.append(f"{name}={value} ({' or '.join(map(str, keys.only[name]))} is known)")
        elif name in keys.used.split():
            wrong += [f"{name}={value} ({form} was wanted)"] if (form := _other_form(name, value, kind)) else []
        elif not name.startswith("_") and name not in keys.known() and value not in OFF:
            wrong.append(f"{name}={value} (which is unknown)")
    if wrong:
        raise Refusal(f"{place} is a {kind} with {', '.join(wrong)}; no whole model of this family has that.")
    if silent := [name for name in keys.used.split() if name not in whole_config and name in FORM_OF]:
        raise Refusal(f"{place} is a {kind} whose config does not say {silent[0]!r}.")
    return whole_config


def _other_form(name: str, value: Any, kind: str) -> str | None:
    """What was wanted instead, in words, if this is of no kind that the key may hold."""
    if name not in FORM_OF or (value is None and (name in NONE or name == NULLS.get(kind))):
        return None
    holds, words = FORM_OF[name]
    if kind == "UNet2DConditionModel" and name in LISTED and each(whole)(value):
        return None
    return None if holds(value) else words


FORM_OF = {name: (holds, words) for words, (holds, names) in FORMS.items() for name in names.split()}
