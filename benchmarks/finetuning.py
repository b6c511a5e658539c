"""Steps of fine-tuning Stable Diffusion 1.5 at a quarter of its width, and drawing with a LoRA, against diffusers'.

    taskset -c 0 python -m benchmarks.finetuning lora controlnet drawing --size 32 --batch 2      5 minutes of one core
    python -m benchmarks.finetuning lora controlnet --device cuda --size 64 --batch 4 --part 1 --bf16      one GPU, full width

`lora` and `controlnet` are the inner loops of diffusers' examples/text_to_image/train_text_to_image_lora.py (rank 8, the
attention's four matrices) and examples/controlnet/train_controlnet.py: prediction, loss, gradients, clipping at 1, AdamW; ours
is what training=finetune does, with fused AdamW. `drawing` is one guided call of the network with a LoRA: ours merged, theirs
by PEFT beside the weights. Both begin with the same weights and see the same noisy latents; loss and a weight after the first
step, or what is drawn, must agree before anything is timed. One row each in docs/benchmarks.md.
"""

from functools import partial
from types import SimpleNamespace

import torch
from diffusers import ControlNetModel
from peft import LoraConfig
from torch import nn
from torch.nn.functional import mse_loss

from benchmarks.options import prepare
from benchmarks.peers import CASES, pair, unet_settings
from benchmarks.race import race
from benchmarks.steps import race_steps
from ldm.adapter.controlnet import ControlNet
from ldm.adapter.lora import LoRA
from ldm.condition.hint import Hint
from ldm.conditioner import Conditioner
from ldm.interop.adapter.controlnet import ties_of
from ldm.interop.bundle import BACKBONE, Bundle
from ldm.interop.network import unet
from ldm.interop.tie import give

NAME, RANK = "SD1.5", 8
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-2}
THEIRS = ["to_k", "to_q", "to_v", "to_out.0"]


def main():
    """Measures what is asked for."""
    race_steps(__doc__, WORK, lambda name: NAME, measure, ("Fine-tuning", "work"))


def measure(name, size, asked):
    """-> the race's result; `asked` are the command line's options."""
    torch.manual_seed(0)
    net, peer, inputs = pair(NAME, asked.part, asked.device)
    most = prepare(asked, net.requires_grad_(False), peer.requires_grad_(False))
    ours, theirs = WORK[name](net, peer, inputs(asked.batch, size), asked)
    return race(ours, theirs, asked.rounds, asked.minutes, asked.device, most)


class Whole(nn.Module):
    """What adapters are attached to, of a network alone."""

    def __init__(self, net):
        super().__init__()
        self.denoiser, self.conditioner = nn.Module(), Conditioner({})
        self.denoiser.backbone, self.autoencoder = net, SimpleNamespace(factor=8, channels=4)


def with_lora(net, peer):
    """Puts the same factors beside both -> ours, by our names; and one of them that is trained, of ours and of theirs."""
    model = Whole(net)
    names = LoRA(RANK).attach(model)
    peer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=THEIRS))
    modules = [n.removeprefix(BACKBONE).removesuffix(".lora_A.default.weight") for n in names if ".lora_A." in n]
    ties = unet.diffusers([f"{module}.weight" for module in modules], unet_settings(CASES[NAME], 1))
    for module in modules:
        there = peer.get_submodule(ties[f"{module}.weight"].theirs[0].removesuffix(".weight"))
        for factor in ("lora_A", "lora_B"):
            weight = model.get_parameter(f"{BACKBONE}{module}.{factor}.default.weight")
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            getattr(there, factor).default.weight.data = weight.detach().clone()
    for parameter in (*net.parameters(), *peer.parameters()):
        parameter.requires_grad_(False)
    for part in (net, peer):
        for key, parameter in part.named_parameters():
            parameter.requires_grad_(".lora_" in key)
    factors = {name: model.get_parameter(name) for name in names}
    return factors, (factors[f"{BACKBONE}{module}.lora_B.default.weight"], there.lora_B.default.weight)


def lora(net, peer, inputs, asked):
    """-> a step of ours, and of theirs."""
    args, theirs, kwargs = inputs
    noise, casting = torch.randn_like(args[0]), autocast(asked)
    _, (own, other) = with_lora(net, peer)
    ours = step_of(net, own, lambda: net(*args), noise, casting, fused=True)
    return ours, step_of(peer, other, lambda: peer(*theirs, **kwargs).sample, noise, casting)


def controlnet(net, peer, inputs, asked):
    """As above."""
    (x, level, cond), (_, _, tokens), _ = inputs
    noise, casting = torch.randn_like(x), autocast(asked)
    picture = torch.rand(len(x), 3, 8 * x.shape[2], 8 * x.shape[3], device=x.device)
    settings = unet_settings(CASES[NAME], asked.part)
    node = {"_target_": "ldm.backbone.unet.UNet", **settings}
    held = {f"{BACKBONE}{n}": p for n, p in net.named_parameters()}
    bundle = Bundle({"backbone": node, "prediction": {"_target_": "ldm.prediction.Noise"}, "condition": {}}, held)
    model, adapter = Whole(net), ControlNet(partial(Hint), name="edges")
    names = adapter.attach(model)
    model.to(x.device)
    own, hint = model.denoiser.backbone.nets["edges"], model.conditioner.embedders["edges"]
    parts = dict(own.named_parameters()) | dict(hint.named_parameters())
    for weight in (p for n, p in parts.items() if n.startswith(("zero", "layers."))):
        nn.init.normal_(weight, std=0.02)
    control = ControlNetModel.from_unet(peer).to(x.device)
    ties = ties_of(unet.NETWORK, bundle, False, 14)
    control.load_state_dict(give(ties, {n: p.detach().clone() for n, p in parts.items()}))
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)

    def ours():
        told = hint([picture * 2 - 1, torch.ones(len(x), device=x.device)], torch.zeros(len(x), dtype=torch.bool))
        return model.denoiser.backbone(torch.cat((x, told.spatial), 1), level, cond)

    def theirs():
        down, mid = control(x, level, tokens, picture, return_dict=False)
        return peer(x, level, tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample

    model.train()
    step = step_of(model, own.zero_middle.weight, ours, noise, casting, fused=True)
    return step, step_of(control.train(), control.controlnet_mid_block.weight, theirs, noise, casting)


def drawing(net, peer, inputs, asked):
    """-> one call of the network with a LoRA, on both sides."""
    args, theirs, kwargs = inputs
    base = {f"{BACKBONE}{n}": p.detach() for n, p in net.named_parameters()}
    factors = {name: p.detach() for name, p in with_lora(net, peer)[0].items()}
    plain = pair(NAME, asked.part, asked.device)[0].requires_grad_(False).eval()
    plain.load_state_dict({n.removeprefix(BACKBONE): x for n, x in base.items()})
    LoRA(RANK).apply(Whole(plain), factors, 1.0, base)
    casting = autocast(asked)

    @torch.no_grad()
    def ours():
        with casting:
            return (plain(*args),)

    @torch.no_grad()
    def other():
        with casting:
            return (peer(*theirs, **kwargs).sample,)

    return ours, other


def autocast(asked):
    """Of both."""
    return torch.autocast(torch.device(asked.device).type, torch.bfloat16, enabled=asked.bf16)


def step_of(network, seen, predict, noise, casting, **optimizer):
    """-> () -> the loss, and `seen`, a trained weight, after the step."""
    weights = [p for p in network.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(weights, **ADAMW, **optimizer)

    def step():
        with casting:
            out = predict()
        loss = mse_loss(out.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.detach()[None], seen.detach().clone()

    return step


WORK = {"lora": lora, "controlnet": controlnet, "drawing": drawing}

if __name__ == "__main__":
    main()
