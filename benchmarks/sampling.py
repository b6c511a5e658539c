"""Guided drawing against diffusers' StableDiffusionPipeline: the same network, prompts, noise and steps, from noise to latents.

    taskset -c 0 python -m benchmarks.sampling ddim dpmpp --size 32 --steps 10 --part 4            3 minutes of one core
    python -m benchmarks.sampling ddim --device cuda --dtype bfloat16 --steps 50 --compile         one GPU, full size

Stable Diffusion 1.5's network (or `--network SDXL`), classifier-free guidance at 7.5 as one batch, on both sides. The latents
must agree before anything is timed. Seconds are those of a whole batch; pictures a second are ours. One row each in
docs/benchmarks.md. With --compile ours is `sample.py compile=true` and theirs is compiled alike.
"""

from types import SimpleNamespace

import diffusers
import torch

from benchmarks.options import options, setting
from benchmarks.page import put
from benchmarks.peers import CASES, pair
from benchmarks.race import HEAD, race
from ldm.denoiser import Denoiser, Timestep
from ldm.drawing.generate import compile_backbone, unit_noise
from ldm.guidance.cfg import CFG
from ldm.prediction import Noise
from ldm.sampler.ddim import DDIM
from ldm.sampler.dpmpp import DPMpp
from ldm.sampler.grid import Leading
from ldm.schedule import ScaledLinear
from ldm.types import Cond

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SAMPLERS = {
    "ddim": (lambda n: DDIM(n, grid=Leading()), lambda: diffusers.DDIMScheduler(**SCALED, clip_sample=False)),
    "dpmpp": (lambda n: DPMpp(n, grid=Leading(spare=1)), lambda: diffusers.DPMSolverMultistepScheduler(**LEADING)),
}
LEADING = SCALED | {"timestep_spacing": "leading"}
SCALE, POOLED = 7.5, 1280  # the guidance's, and how wide XL's pooled text is


def main():
    """Measures what is asked for."""
    parser = options(__doc__.splitlines()[0], SAMPLERS, rounds=7)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--part", type=int, default=1, help="divides the width")
    parser.add_argument("--network", default="SD1.5", help="or SDXL")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.what:
        size = asked.size or CASES[asked.network].size
        result = measure(name, size, asked)
        row = [f"{name}, {asked.steps} steps", f"{setting(asked, size)}, width / {asked.part}", *result.cells()]
        row.append(result.speed(asked.batch))
        print(*row, sep=" | ", flush=True)
        if not asked.dry:
            put("Sampling", ["sampler", "setting", *HEAD, "pictures/s"], row, keys=2)


@torch.no_grad()
def measure(name, size, asked):
    """-> the race's result; `asked` are the command line's options."""
    torch.manual_seed(0)
    dtype = getattr(torch, asked.dtype)
    net, peer, inputs = pair(asked.network, asked.part, asked.device, dtype)
    told, null = (inputs(asked.batch, size)[0][2] for _ in range(2))
    seeds = range(asked.batch)
    noise = unit_noise(seeds, (4, size, size)).to(asked.device, dtype)
    sampler, scheduler = SAMPLERS[name]
    denoiser = Denoiser(net.eval(), ScaledLinear(), Noise(), Timestep(1000))
    model = SimpleNamespace(denoiser=denoiser, conditioner=SimpleNamespace(embedders={}))
    pipeline = pipeline_of(peer.eval(), scheduler(), told.vector is not None).to(asked.device)
    asks = {"prompt_embeds": told.tokens, "negative_prompt_embeds": null.tokens, "latents": noise, "output_type": "latent"}
    asks |= {"height": 8 * size, "width": 8 * size, "num_inference_steps": asked.steps, "guidance_scale": SCALE}
    if told.vector is not None:
        told, null = (sized(cond, peer, 8 * size) for cond in (told, null))
        asks |= {"pooled_prompt_embeds": told.vector[:, :POOLED], "negative_pooled_prompt_embeds": null.vector[:, :POOLED]}
    model.condition = lambda request, only=None: told if only is None else null
    if asked.compile:
        compile_backbone(net)
        peer.to(memory_format=torch.channels_last)
        pipeline.unet = torch.compile(peer, mode="reduce-overhead", dynamic=False)

    def ours():
        return (sampler(asked.steps)(CFG(SCALE)(model, {}), model.denoiser.schedule, noise, seeds),)

    def theirs():
        return (pipeline(**asks).images,)

    most = 1e-3 if dtype == torch.float32 else 1e-1  # of latents that went through many steps
    return race(ours, theirs, asked.rounds, asked.minutes, asked.device, most, asked.tell)


def sized(cond, peer, side):
    """What the network of XL hears of a picture that was `side` pixels square, and is so whole."""
    sizes = torch.tensor([side, side, 0, 0, side, side], device=cond.vector.device)
    waves = peer.add_time_proj(sizes).flatten().to(cond.vector).expand(len(cond.vector), -1)
    return Cond(tokens=cond.tokens, vector=torch.cat((cond.vector[:, :POOLED], waves), 1))


def pipeline_of(unet, scheduler, large=False):
    """diffusers' pipeline around a network, of a small autoencoder that is never called."""
    vae = diffusers.AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=["DownEncoderBlock2D"] * 4)
    parts = {"vae": vae, "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    if large:
        parts = {**dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")), "vae": vae}
        pipeline = diffusers.StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **parts, add_watermarker=False)
    else:
        pipeline = diffusers.StableDiffusionPipeline(unet=unet, scheduler=scheduler, **parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    main()
