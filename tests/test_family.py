"""The recipes: at their published size on the meta device; shrunken, they train, resume, travel and draw."""

import json

import pytest
import torch
from diffusers import (
    FluxPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from benchmarks.t5 import save_t5
from ldm.build import build, build_stage, load_model
from ldm.command.sample import sample
from ldm.command.train import train
from ldm.compose import CONFIGS, compose_config
from ldm.drawing.generate import unit_noise
from ldm.files.folder import load_tensors, save_model
from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.interop.convert import read, write
from ldm.nn.empty import weightless
from ldm.sampler.ddim import DDIM
from ldm.sampler.euler import Euler
from ldm.sampler.grid import BySize, Leading

SIZES = {
    "sd/v1": 859_520_964,
    "sd/v2": 865_910_724,
    "sd/xl": 2_567_463_684,
    "dit/xl_2": 673_663_120,
    "dit/sit_xl_2": 673_663_120,
    "sd3/medium": 2_028_328_000,
    "pixart/xl_2": 610_856_096 - 16 * 1153,
}  # DiT, SiT and PixArt without range and fixed positions
TOWERS = {name: ["text"] for name in ("sd/v1", "sd/v2")} | {"sd/xl": ["text_sdxl.towers.large", "text_sdxl.towers.giant"]}
TOWERS |= {"sd3/medium": ["text_sd3.towers.large", "text_sd3.towers.giant"]}
STAGES = {"sd/v1": [256, 512], "sd/v2": [256, 512, 512, 768], "sd/xl": [256, 512, 1024], "dit/xl_2": [256], "dit/sit_xl_2": [256]}
STAGES |= {"sd3/medium": [256, 1024], "pixart/xl_2": [256, 512]}
STEPS = ["trainer.val_check_interval=2", "callback.checkpoint.every=2", "trainer.log_every_n_steps=1", "data.batch=4"]
STEPS += ["+trainer.limit_val_batches=1"]
EMOJI = ["data.groups=[Activities]", "data.val_fraction=0.2", "size=tiny", "logger=[csv]"]
PIPELINES = {"sd/v1": StableDiffusionPipeline, "sd/v2": StableDiffusionPipeline, "sd/xl": StableDiffusionXLPipeline}
PIPELINES |= {"sd3/medium": StableDiffusion3Pipeline, "pixart/xl_2": PixArtSigmaPipeline, "flux/tiny": FluxPipeline}


@pytest.mark.parametrize("name", SIZES)
def test_recipes_have_their_published_size(name):
    offline = [f"condition.{tower}.pretrained=null" for tower in TOWERS.get(name, [])]
    offline += [f"condition.{t5}.pretrained=false" for t5 in {"sd3/medium": ["t5_sd3"], "pixart/xl_2": ["t5"]}.get(name, [])]
    config = compose_config("train", [f"experiment={name}", *offline])
    config.autoencoder = {"_target_": "ldm.autoencoder.kl.KL", "channels": 16 if name == "sd3/medium" else 4}
    with weightless():
        stage = build_stage(config)
    count = sum(p.numel() for p in stage.model.denoiser.parameters())
    assert count == SIZES[name]
    trained = sum(p.numel() for p in stage.model.conditioner.parameters() if p.requires_grad)
    assert trained == (1001 * 1152 if "dit/" in name else 0)


@pytest.mark.parametrize("name", SIZES)
def test_the_stages_that_a_recipe_names_compose(name):
    """The command in its first lines, with what each indented line adds to it."""
    lines = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()
    whole = next(line for line in lines if "python train.py" in line).split("train.py ")[1].split("   ")[0].split()
    added = [line.split()[1:] for line in lines if line.startswith("#   ")] or [[]]
    stages = [compose_config("train", [*whole, *words]) for words in added]
    assert [config.data.size for config in stages] == STAGES[name]
    if name == "sd/xl":
        noises = [config.objective.noise for config in stages]
        assert "strength" not in [*noises[0], *noises[1]] and noises[2].strength == 0.05


def test_pictures_of_classes_need_no_captions(tmp_path):
    """As ImageNet has none."""
    config = compose_config("train", ["experiment=dit/xl_2", "data=shards", f"data.train={tmp_path}"])
    assert build(config.data).fields == {"image": "jpg", "label": "cls"}


@pytest.fixture(scope="module")
def home(tmp_path_factory, clip_folder):
    """A runs folder with an autoencoder of factor 4 and a CLIP, untrained but measured."""
    from ldm.autoencoder.kl import KL

    runs = tmp_path_factory.mktemp("runs")
    (runs / "quickstart").mkdir()
    (runs / "quickstart" / "clip").symlink_to(clip_folder)
    recipe = {"_target_": "ldm.autoencoder.kl.KL", "width": 8, "mult": [1, 1, 1], "res_blocks": 1, "groups": 4}
    torch.manual_seed(0)
    measured = {"mean": torch.randn(4), "std": torch.rand(4) + 0.5, "count": torch.tensor(9)}
    weights = KL(**{k: v for k, v in recipe.items() if k[0] != "_"}).state_dict() | measured
    save_model(weights, recipe, runs / "quickstart" / "autoencoder")
    save_t5(["kite", "a red fox", "yo-yo"], runs / "tiny" / "t5")
    return runs


@pytest.fixture(scope="module", params=[*SIZES, "flux/tiny"])
def trained(request, home, emoji_root):
    """A recipe, shrunken, after two steps and after one more."""
    ours = [f"experiment={request.param}", f"runs={home}", f"data.root={emoji_root}", *EMOJI, *STEPS]
    first = train(compose_config("train", [*ours, "trainer.max_steps=2"]))
    assert train(compose_config("train", [*ours, "trainer.max_steps=3"])) == first
    return request.param, first


def test_a_shrunken_recipe_trains_resumes_and_draws(trained, tmp_path):
    name, folder = trained
    assert (folder / "checkpoints" / "step-00000003.ckpt").is_file()
    ask = "ask.label=3" if "dit" in name else "prompt=kite"
    drawn = sample(compose_config("sample", [f"model={folder}", ask, "sampler.steps=2", f"out={tmp_path}"]))
    assert drawn.shape == (1, 3, 32, 32) and drawn.isfinite().all()


MORE = {"sd3/medium": {"negative_prompt": "yo-yo", "max_sequence_length": 16}, "flux/tiny": {"max_sequence_length": 16}}
MORE["pixart/xl_2"] = {"negative_prompt": "yo-yo", "max_sequence_length": 16, "use_resolution_binning": False}
SAMPLERS = {"sd3/medium": Euler(10), "flux/tiny": Euler(10, grid=BySize())}


def test_what_was_trained_here_draws_the_same_in_diffusers(trained, tmp_path):
    """The statistics of the latents travel inside the autoencoder."""
    name, folder = trained
    if name not in PIPELINES:
        pytest.skip("DiT travels by the published names")
    write(read(str(folder))[0], tmp_path / "out", "diffusers", "cc0-1.0", str(folder))
    assert "experiment" not in json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert f"name: {name}" in (tmp_path / "out" / "README.md").read_text()
    pipeline = PIPELINES[name].from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    model, noise = load_model(folder), unit_noise([5], (4, 8, 8))
    words = {"num_inference_steps": 10, "guidance_scale": 3.0, "latents": noise, "height": 32, "width": 32, "output_type": "pt"}
    words |= MORE.get(name, {"negative_prompt": "yo-yo"})
    if name == "flux/tiny":
        words["latents"] = FluxPipeline._pack_latents(noise, *noise.shape)
    wanted = pipeline("kite", **words).images
    ask = {"caption": ["kite"], **({} if name == "flux/tiny" else {"negative.caption": ["yo-yo"]})}
    if name == "sd/xl":
        ask |= {k: torch.tensor([0 if "crop" in k else 32]) for k in model.conditioner.embedders["number"].key}
    with torch.no_grad():
        schedule = model.denoiser.schedule
        guide = Unguided() if name == "flux/tiny" else CFG(3.0)
        x = SAMPLERS.get(name, DDIM(10, grid=Leading(last=1 / 1000)))(guide(model, ask), schedule, noise, [5])
        drawn = model.autoencoder.decode(x).clamp(-1, 1)
    torch.testing.assert_close(drawn.add(1).div(2), wanted, atol=1e-3, rtol=0)


def test_fine_tuning_begins_from_it_and_says_what_it_took(home, emoji_root, trained, capsys):
    name, folder = trained
    if name != "sd/v1":
        pytest.skip("once is enough")
    ours = [f"experiment={name}", f"runs={home}", f"data.root={emoji_root}", *EMOJI, f"model.init={folder}"]
    weights = load_tensors(folder / "model.safetensors")
    stage = build_stage(compose_config("train", ours))
    assert "0 grown, 0 new, 0 left" in capsys.readouterr().out
    assert all(torch.equal(stage.model.state_dict()[n], x) for n, x in weights.items())
    wider = build_stage(compose_config("train", [*ours, "condition=[text,inpaint]"])).model.denoiser.backbone.encoder[0][0].weight
    assert "4 of 9 input channels, the others zero" in capsys.readouterr().out
    assert torch.equal(wider[:, :4], weights["denoiser.backbone.encoder.0.0.weight"]) and not wider[:, 4:].any()
