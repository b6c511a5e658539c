"""Small random models of the Stable Diffusion family as diffusers and transformers build them."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    LDMTextToImagePipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.files.folder import write_json, write_text
from ldm.interop.convert import read, write
from ldm.tower.clip import vocabulary

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def loud(network):
    """Random weights that leave no branch silent, and pass on what they hear as loud as it came."""
    for name, p in network.named_parameters():
        torch.nn.init.normal_(p, std=0.1 if p.ndim < 2 else p[0].numel() ** -0.5)
        if p.ndim == 1 and name.endswith("weight"):
            p.data += 1
    return network.eval()


def their_unet(attends, tokens, width=32, mult=(1, 2), spatial=0, **settings):
    """diffusers' U-Net; attends: one switch a level."""
    torch.manual_seed(1)
    return loud(
        UNet2DConditionModel(
            in_channels=4 + spatial,
            out_channels=4,
            block_out_channels=tuple(width * m for m in mult),
            down_block_types=tuple(CROSS[0] if a else PLAIN[0] for a in attends),
            up_block_types=tuple(CROSS[1] if a else PLAIN[1] for a in reversed(attends)),
            layers_per_block=1,
            cross_attention_dim=tokens,
            sample_size=8,
            **settings,
        )
    )


def their_vae(mult=(1, 2), **settings):
    """diffusers' KL autoencoder, of factor 2."""
    torch.manual_seed(2)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * len(mult), "up_block_types": ("UpDecoderBlock2D",) * len(mult)}
    return loud(
        AutoencoderKL(block_out_channels=[32 * m for m in mult], latent_channels=4, layers_per_block=1, **kinds, **settings)
    )


def their_text(act="quick_gelu", width=64, layers=3, projection=None):
    """transformers' CLIP text tower, with CLIP's vocabulary."""
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=16,
        projection_dim=projection or width,
        hidden_act=act,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return loud((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def their_tokenizer(folder, pad="<|endoftext|>"):
    """transformers' CLIP tokenizer, of the vocabulary that ships with open_clip."""
    ids, merges = vocabulary()
    write_json(ids, folder / "vocab.json")
    write_text("#version: 0.2\n" + "\n".join(merges) + "\n", folder / "merges.txt")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16, pad_token=pad)


def scheduler(prediction="epsilon"):
    """Stable Diffusion's, as published."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**betas, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def their_pipeline(kind, folder):
    """A pipeline of `kind` (sd1, sd2, inpaint, xl), its words from `folder`."""
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    vae = their_vae(scaling_factor=0.13025 if kind == "xl" else 0.18215)
    tokenizer = their_tokenizer(folder / "a", "!" if kind == "sd2" else "<|endoftext|>")
    if kind == "xl":
        extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        extra |= {"projection_class_embeddings_input_dim": 48 + 6 * 256, "transformer_layers_per_block": (1, 3)}
        unet = their_unet((False, True), 64 + 128, use_linear_projection=True, attention_head_dim=(2, 4), **extra)
        second = their_text("gelu", 128, projection=48)
        both = {"text_encoder": their_text(), "text_encoder_2": second, "tokenizer_2": their_tokenizer(folder / "b", "!")}
        return StableDiffusionXLPipeline(vae=vae, unet=unet, tokenizer=tokenizer, scheduler=scheduler(), **both)
    if kind == "sd2":
        unet = their_unet((True, False), 64, width=64, use_linear_projection=True, attention_head_dim=(1, 2))
        words = {"text_encoder": their_text("gelu"), "tokenizer": tokenizer}
        return StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler("v_prediction"), **words, **nothing)
    made = StableDiffusionInpaintPipeline if kind == "inpaint" else StableDiffusionPipeline
    unet = their_unet((True, False), 64, spatial=5 if kind == "inpaint" else 0)
    return made(vae=vae, unet=unet, text_encoder=their_text(), tokenizer=tokenizer, scheduler=scheduler(), **nothing)


def their_vq(mult=(1, 2), attends=()):
    torch.manual_seed(5)
    kinds = {
        "down_block_types": ["AttnDownEncoderBlock2D" if i in attends else "DownEncoderBlock2D" for i in range(len(mult))],
        "up_block_types": ["AttnUpDecoderBlock2D" if i in attends else "UpDecoderBlock2D" for i in reversed(range(len(mult)))],
    }
    sizes = {"block_out_channels": [32 * m for m in mult], "latent_channels": 3, "layers_per_block": 1}
    return loud(VQModel(**kinds, **sizes, num_vq_embeddings=16, vq_embed_dim=3, scaling_factor=1.0))


def depth(home):
    settings = {"use_linear_projection": True, "attention_head_dim": (1, 2)}
    unet = their_unet((True, False), 64, width=64, spatial=1, **settings)
    words = {"text_encoder": their_text("gelu"), "tokenizer": their_tokenizer(home / "words", "!")}
    made = StableDiffusionDepth2ImgPipeline
    return made(vae=their_vae(), unet=unet, scheduler=scheduler(), depth_estimator=None, feature_extractor=None, **words)


def upscaler(home):
    only = {"only_cross_attention": (True, True, False), "num_class_embeds": 1000, "use_linear_projection": True}
    unet = their_unet((False, True, True), 64, mult=(1, 2, 2), spatial=3, **only)
    words = {"text_encoder": their_text("gelu"), "tokenizer": their_tokenizer(home / "words", "!")}
    low = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    made, nothing = StableDiffusionUpscalePipeline, {"safety_checker": None, "feature_extractor": None}
    vae = their_vae((1, 2, 2), scaling_factor=0.08333)
    return made(
        vae=vae, unet=unet, low_res_scheduler=low, scheduler=scheduler("v_prediction"), watermarker=None, **words, **nothing
    )


def unconditional(home):
    kinds = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    sizes = {"block_out_channels": (32, 64), "attention_head_dim": 32, "layers_per_block": 1, "sample_size": 8}
    unet = loud(
        UNet2DModel(in_channels=3, out_channels=3, **sizes, **kinds, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0)
    )
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    only = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return LDMPipeline(vqvae=their_vq(), unet=unet, scheduler=DDIMScheduler(**betas, **only))


def refiner(home):
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}
    extra |= {"projection_class_embeddings_input_dim": 48 + 5 * 256, "attention_head_dim": (1, 2)}
    unet = their_unet((False, True), 128, width=64, transformer_layers_per_block=2, **extra)
    words = {"text_encoder_2": their_text("gelu", 128, projection=48), "tokenizer_2": their_tokenizer(home / "words", "!")}
    made = StableDiffusionXLImg2ImgPipeline
    both = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    return made(vae=their_vae(scaling_factor=0.13025), unet=unet, scheduler=scheduler(), **both, **words)


def of_words(home):
    """LDM's text to picture; the head of its text model, which nobody reads, is written as zeros."""
    torch.manual_seed(9)
    write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "##es"]) + "\n", home / "w" / "vocab.txt"
    )
    text = loud(LDMBertModel(LDMBertConfig(vocab_size=9, d_model=64, encoder_layers=2, encoder_ffn_dim=256)))
    for p in text.to_logits.parameters():
        torch.nn.init.zeros_(p)
    words = {"bert": text, "tokenizer": BertTokenizer.from_pretrained(home / "w")}
    unet = their_unet((True, False), 64)
    return LDMTextToImagePipeline(vqvae=their_vae((1, 1, 2, 2)), unet=unet, scheduler=scheduler(), **words)


def of_classes(home):
    torch.manual_seed(6)
    sizes = {"num_attention_heads": 1, "attention_head_dim": 64, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    net = loud(DiTTransformer2DModel(**sizes, in_channels=4, out_channels=8, num_embeds_ada_norm=1000))
    first = net.transformer_blocks[0].norm1.emb.state_dict()
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    only = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DiTPipeline(net, their_vae(), DDIMScheduler(**betas, **only))


def their_pipeline_and_ours(kind, home):
    """-> diffusers' pipeline of a kind, which is saved in HOME/theirs, and ours of it in HOME/ours."""
    pipeline = their_pipeline(kind, home)
    pipeline.save_pretrained(home / "theirs")
    write(read(str(home / "theirs"))[0], home / "ours", "ldm", source="x")
    return pipeline
