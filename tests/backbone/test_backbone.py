"""What test_networks leaves: the noise level's waves, tokens in the MLP, heads."""

import math

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import nn

from ldm.backbone.dit import DiT
from ldm.backbone.mlp import MLP
from ldm.backbone.unet import UNet
from ldm.condition.bert import Bert
from ldm.errors import Refusal
from ldm.interop.network.dit import published
from ldm.interop.tie import bring, give, taken
from ldm.nn.sinusoid import sinusoid
from ldm.nn.transformer import apply_rotary, rotation
from ldm.types import Cond, Widths


def test_the_noise_level_is_told_in_cosines_then_sines():
    """CompVis' timestep_embedding, term by term."""
    told = sinusoid(torch.tensor([0.0, 1.0, 999.0]), 8)
    for row, t in zip(told.tolist(), (0, 1, 999)):
        angles = [t * 10_000 ** (-i / 4) for i in range(4)]
        assert row == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles], abs=1e-4)


def test_the_mlp_names_the_size_that_the_latents_have():
    with pytest.raises(Refusal, match=r"latents are 4x4, and this backbone=mlp is for 3x3 alone: say backbone\.size=4"):
        MLP(2, Widths(), size=3, width=16)(torch.zeros(1, 2, 4, 4), torch.zeros(1), Cond())


def test_the_mlp_does_not_hear_masked_tokens():
    net, x, level = MLP(2, Widths(tokens=5), size=3, width=16), torch.randn(2, 2, 3, 3), torch.rand(2)
    tokens, mask = torch.randn(2, 4, 5), torch.tensor([[True, True, False, False]] * 2)
    short = net(x, level, Cond(tokens=tokens[:, :2]))
    torch.testing.assert_close(net(x, level, Cond(tokens=tokens, mask=mask)), short)
    assert not torch.allclose(net(x, level, Cond(tokens=tokens)), short, atol=1e-4)


def test_gradients_reach_every_weight_of_the_unet():
    """Once the zero initialisation is broken, no branch is dead."""
    net = UNet(3, Widths(vector=6, tokens=12, spatial=2), width=16, mult=(1, 2), res_blocks=1, depth=(0, 1), heads=2, groups=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    cond = Cond(vector=torch.randn(2, 6), tokens=torch.randn(2, 4, 12))
    net(torch.randn(2, 5, 8, 8), torch.rand(2) * 100, cond).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


# ---- DiT


def test_bert_against_diffusers(tmp_path):
    """The LDM paper's text model, its projections of queries, keys and values laid together."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "fox", "##es"]))
    sizes = {"vocab_size": 8, "d_model": 24, "encoder_layers": 2, "encoder_ffn_dim": 96, "max_position_embeddings": 7}
    peer = LDMBertModel(LDMBertConfig(**sizes, encoder_attention_heads=2, head_dim=16)).eval()
    ours = Bert(str(tmp_path), width=24, depth=2, heads=2, head_width=16, length=7)
    theirs = dict(peer.model.named_parameters())
    pairs = {"words": "embed_tokens", "places": "embed_positions", "norm": "layer_norm"}
    for i in range(2):
        words = {"norm_in": "self_attn_layer_norm", "norm_out": "final_layer_norm", "out": "self_attn.out_proj", "wide": "fc1"}
        pairs |= {f"blocks.{i}.{a}": f"layers.{i}.{b}" for a, b in {**words, "narrow": "fc2"}.items()}
    for p in theirs.values():
        nn.init.normal_(p, std=0.2)
    with torch.no_grad():
        for i, block in enumerate(ours.blocks):
            block.qkv.weight.copy_(torch.cat([theirs[f"layers.{i}.self_attn.{x}_proj.weight"] for x in "qkv"]))
        for name, p in ours.named_parameters():
            if "qkv" not in name:
                stem, leaf = name.rsplit(".", 1)
                p.copy_(theirs[f"{pairs[stem]}.{leaf}"])
    ids = ours.ids(["A red fox", "Foxes!"])
    assert ids.tolist() == [[2, 4, 5, 6, 3, 0, 0], [2, 6, 7, 1, 3, 0, 0]]
    wanted = peer.model(ids).last_hidden_state
    torch.testing.assert_close(ours(["A red fox", "Foxes!"], torch.zeros(2, dtype=torch.bool)).tokens, wanted, atol=1e-4, rtol=0)


def small_dit(**settings):
    net = DiT(4, Widths(vector=32), size=8, width=32, depth=2, heads=2, **settings)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def test_dit_against_diffusers():
    """The same weights in diffusers' network, where the noise level's and the class' embedding stand in every block.

    diffusers' waves end at 1/10,000 where the published code's, and ours, stop one step before: they are set to the latter.
    """
    peer = DiTTransformer2DModel(2, 16, 4, 8, 2, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=32).eval()
    net, table = small_dit(learn_range=True), torch.randn(11, 32)
    w = net.state_dict()
    theirs = {"pos_embed.proj": "embed", "proj_out_1": "last.modulate", "proj_out_2": "last.out"}
    for i in range(2):
        block, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        theirs |= {f"{block}.norm1.emb.timestep_embedder.linear_{j}": f"level.{k}" for j, k in ((1, 0), (2, 2))}
        theirs |= {f"{block}.norm1.linear": f"{ours}.modulate", f"{block}.attn1.to_out.0": f"{ours}.attend.out"}
        theirs |= {f"{block}.ff.net.0.proj": f"{ours}.feed.wide", f"{block}.ff.net.2": f"{ours}.feed.out"}
    state = {f"{a}.{leaf}": w[f"{b}.{leaf}"] for a, b in theirs.items() for leaf in ("weight", "bias")}
    for i in range(2):
        for leaf in ("weight", "bias"):
            parts = w[f"blocks.{i}.attend.qkv.{leaf}"].chunk(3)
            state |= {f"transformer_blocks.{i}.attn1.to_{x}.{leaf}": part for x, part in zip("qkv", parts)}
        state[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = table
    peer.load_state_dict(state)
    for block in peer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([4, 10])
    with torch.no_grad():
        wanted = peer(x, t, label).sample[:, :4]
        torch.testing.assert_close(net(x, t.float(), Cond(vector=table[label])), wanted, atol=1e-4, rtol=0)


def test_dit_starts_silent_and_every_weight_learns():
    net = DiT(4, Widths(vector=32), size=8, width=32, depth=2, heads=2, rms_norm=True, swiglu=True, rotary=True, norm_heads=True)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), Cond(vector=torch.randn(2, 32))
    assert not net(x, t, cond).any()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    net(x, t, cond).square().sum().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]


def test_rotary_attention_depends_on_distances_alone():
    """Moving both places by the same rows and columns changes no product of query and key."""
    cos, sin = rotation(6, 6, 16, torch.zeros(1, dtype=torch.float64))
    q, k = torch.randn(2, 16, dtype=torch.float64)

    def product(a, b):
        return apply_rotary(q[None], cos[[a]], sin[[a]]) @ apply_rotary(k[None], cos[[b]], sin[[b]]).T

    torch.testing.assert_close(product(0, 8), product(13, 21))
    assert not torch.allclose(product(0, 8), product(0, 9))


def test_rotary_without_rotation_is_plain():
    x = torch.randn(1, 2, 5, 16)
    cos, sin = rotation(1, 1, 16, x)
    torch.testing.assert_close(apply_rotary(x, cos, sin), x)


def test_the_published_names_of_dit():
    net = small_dit()
    ties = published(net.state_dict())
    assert {
        "x_embedder.proj.weight",
        "t_embedder.mlp.2.bias",
        "blocks.1.adaLN_modulation.1.weight",
        "blocks.0.mlp.fc2.bias",
    } <= taken(ties)
    theirs = give(ties, net.state_dict())
    assert theirs["pos_embed"].shape == (1, 16, 32) and len(theirs) == len(net.state_dict())
    shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in bring(ties, theirs, shapes).items())
    turned_round = give(published(net.state_dict(), reverse=True), net.state_dict())
    assert torch.equal(turned_round["final_layer.linear.weight"], -net.state_dict()["last.out.weight"])


def test_what_dit_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"width=30 must divide into heads=4"):
        DiT(4, Widths(), width=30, heads=4)


def test_the_unet_does_not_hear_masked_tokens():
    net = UNet(2, Widths(tokens=5), width=8, mult=(1,), res_blocks=1, depth=(1,), heads=2, groups=4).eval()
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    x, level, tokens = torch.randn(2, 2, 4, 4), torch.rand(2), torch.randn(2, 6, 5)
    mask = torch.tensor([[True, True, False, False, False, False], [True, True, True, False, False, False]])
    whole = net(x, level, Cond(tokens=tokens, mask=mask))
    torch.testing.assert_close(whole, net(x, level, Cond(tokens=tokens[:, :3], mask=mask[:, :3])))
    torch.testing.assert_close(whole[:1], net(x[:1], level[:1], Cond(tokens=tokens[:1, :2])), rtol=1e-4, atol=1e-5)


def test_no_block_is_a_bare_list():
    """torch 2.10 and 2.11 refuse to shard a ModuleList, whether it has a forward or not."""
    unet = UNet(2, Widths(tokens=5), width=8, mult=(1, 2), res_blocks=1, depth=(1, 1), heads=2, groups=4)
    dit = DiT(2, Widths(vector=16), size=4, patch=2, width=16, depth=2, heads=2)
    for net in (unet, dit):
        assert len(net.blocks) >= 2
        assert not any(isinstance(block, nn.ModuleList | nn.ModuleDict) for block in net.blocks)
