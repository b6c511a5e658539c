"""The networks of the family have as many parameters as published; nothing is held in memory.

Exact numbers are those of the published weights, which diffusers' networks of the published configs have too; those in
millions stand in the papers. Stable Diffusion 1, 2, XL and DiT are counted as whole recipes in test_family.
"""

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from omegaconf import OmegaConf

from ldm.backbone.unet import UNet
from ldm.build import build
from ldm.compose import CONFIGS
from ldm.condition.bert import Bert
from ldm.condition.label import Label
from ldm.condition.upscale import Upscale
from ldm.interop.network import unet
from ldm.interop.part import bert
from ldm.interop.tie import give
from ldm.types import Widths


def config(room, name):
    """A config and the one that it varies, without composing all the others."""
    node = OmegaConf.load(CONFIGS / room / f"{name}.yaml")
    return OmegaConf.merge(*(config(room, base) for base in node.pop("defaults", [])), node)


def count(network):
    return sum(p.numel() for p in network.parameters())


UNETS = {
    "refiner of XL": ("unet_refiner", 4, Widths(tokens=1280, vector=2560), 2_259_526_660),
    "inpainting": ("unet", 4, Widths(tokens=768, spatial=5), 859_535_364),
    "depth": ("unet_sd2", 4, Widths(tokens=1024, spatial=1), 865_913_604),
    "FFHQ, LDM-4": ("unet_ldm4_unconditional", 3, Widths(), 274_056_163),
    "churches, LDM-8": ("unet_ldm8_unconditional", 4, Widths(), 294_966_916),
    "ImageNet, LDM-4": ("unet_ldm4", 3, Widths(tokens=512), 400_920_579),
    "text, LDM-8": ("unet", 4, Widths(tokens=1280), 872_300_484),
}


@pytest.mark.parametrize("name", UNETS)
def test_unets(name):
    backbone, channels, widths, wanted = UNETS[name]
    with torch.device("meta"):
        assert count(build(config("backbone", backbone))(channels=channels, widths=widths)) == wanted


@pytest.mark.parametrize("name", UNETS)
def test_how_many_heads_a_published_file_has(name):
    """Which no shape tells: read off a file without its yaml, they are those of the config."""
    backbone, channels, widths, _ = UNETS[name]
    told = config("backbone", backbone)
    with torch.device("meta"):
        weights = build(told)(channels=channels, widths=widths).state_dict()
    ties = unet.compvis(weights, told)
    found = unet.settings_of({n: tuple(x.shape) for n, x in give(ties, weights).items()})
    assert (found["head_width"] or found["heads"]) == (told.head_width or told.heads)


def test_ldms_other_text_and_class_models_have_32_wide_heads():
    """Text at 256 px on VQ-f4, whose tokens are 640 wide; classes on VQ-f8 (CompVis' configs text2img256, cin-ldm-vq-f8)."""
    for channels, tokens, width, mult, depth in ((3, 640, 192, (1, 2, 3, 5), (0, 1, 1, 1)), (4, 512, 256, (1, 2, 4), (1, 1, 1))):
        settings = {"width": width, "mult": mult, "depth": depth, "head_width": 32}
        with torch.device("meta"):
            weights = UNet(channels, Widths(tokens=tokens), **settings).state_dict()
        theirs = {n: tuple(x.shape) for n, x in give(unet.compvis(weights, settings), weights).items()}
        assert theirs["middle_block.1.proj_in.weight"][2:] == (1, 1) and unet.settings_of(theirs)["head_width"] == 32


def test_the_text_model_of_ldm():
    """Every tensor of the published BERT by diffusers' names; its settings read off CompVis' names."""
    shapes = bert.bert_shapes(30_522, width=1280, depth=32, heads=8, head_width=64, length=77)
    with torch.device("meta"):
        peer = LDMBertModel(LDMBertConfig()).state_dict()
        ours = {name: torch.empty(shape) for name, shape in shapes.items()}
    theirs = give(bert.diffusers(shapes), ours) | bert.head(ours["words.weight"])
    assert {n: x.shape for n, x in theirs.items()} == {n: x.shape for n, x in peer.items()}
    single = {n: tuple(x.shape) for n, x in give(bert.compvis(shapes), ours).items()}
    assert bert.settings_of(single) == {"width": 1280, "depth": 32, "heads": 8, "head_width": 64, "length": 77}
    assert single["attn_layers.layers.63.1.net.0.0.weight"] == (5120, 1280) and len(single) + 2 == len(peer)


def test_what_is_trained_beside_them(tmp_path):
    """The class table of LDM-4 and the noise table of the upscaler; BERT, of whose published count the head is left out."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(30_518))]))
    with torch.device("meta"):
        upscaler = build(config("backbone", "unet_upscaler"))(channels=4, widths=Widths(tokens=1024, vector=1024, spatial=3))
        assert count(upscaler) + count(Upscale(build(config("autoencoder", "kl_f4")))) == 473_398_020
        assert count(Label(1000, 512)) + UNETS["ImageNet, LDM-4"][3] == 401_433_091  # table 13 of the paper: 400M
        head = 1280 * 30_522 + 30_522
        assert count(Bert(str(tmp_path))) + head == 581_994_042
    # Section 4.3.1 of the paper; CompVis' code prints "DiffusionWrapper has 872.30 M params."
    assert round((UNETS["text, LDM-8"][3] + 581_994_042) / 1e9, 2) == 1.45


STAGES = {"kl": 83_653_863, "kl_f4": 55_312_063, "kl_f16": 69_610_963, "kl_f32": 103_880_131, "kl_f8_16": 83_819_683}
STAGES |= {"vq": 55_322_782, "vq_f8": 67_717_295, "vq_f16": 69_593_371}


@pytest.mark.parametrize("name", STAGES)
def test_first_stages(name):
    with torch.device("meta"):
        stage = build(config("autoencoder", name))
    assert count(stage) + (stage.codebook.numel() if hasattr(stage, "codebook") else 0) == STAGES[name]


# Table 4 of https://arxiv.org/abs/2212.09748, in millions, for patches of 2, 4 and 8: with the class table and the range.
DITS = {"dit_s": (33, 33, 33), "dit_b": (130, 131, 131), "dit_l": (458, 458, 459), "dit": (675, 675, 676)}


@pytest.mark.parametrize("name", DITS)
def test_dits(name):
    node = config("backbone", name)
    for patch, wanted in zip((2, 4, 8), DITS[name]):
        told = {"widths": Widths(vector=node.width), "learn_range": True, "patch": patch}
        identity = {"_target_": "ldm.nn.layers.identity", "_partial_": True}
        with torch.device("meta"):
            net = build({**node, "vector": identity})(channels=4, **told)
        millions = (count(net) + net.position.numel() + count(Label(1000, node.width, "vector"))) / 1e6
        assert millions == pytest.approx(wanted, abs=0.6), patch


def test_published_dit_and_lightning():
    """675M both (2212.09748, table 1; 2501.01423, table 2); SiT's networks are DiT's (2401.08740, table 1)."""
    with torch.device("meta"):
        for name, channels in (("dit_xl_2", 4), ("lightningdit_xl_1", 32)):
            net = build(config("backbone", name))(channels=channels, widths=Widths(vector=1152))
            assert round((count(net) + count(Label(1000, 1152, "vector"))) / 1e6) == 675, name
