"""The recipes that put together what learns fast: at their size on the meta device; shrunken, they take steps."""

import pytest
import torch

from helpers.runs import write_runs
from ldm.build import build_stage
from ldm.compose import compose_config
from ldm.nn.empty import weightless
from ldm.training.plan import cost
from ldm.types import Draw

TEACHER = "extractor@objective.of.teacher=clip"
BATCH = {"image": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1}
BATCH |= {"label": torch.arange(2), "caption": ["a", "fox"], "position": torch.arange(2)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clip_folder):
    return write_runs(tmp_path_factory.mktemp("home") / "runs", clip_folder)


@pytest.mark.slow
def test_imagenet256_at_its_size(runs):
    """Its work is counted on no device: the middle blocks see a quarter of the patches."""
    config = compose_config("train", ["experiment=speedrun/imagenet256", TEACHER, "objective.of.weights=null", f"runs={runs}"])
    config.autoencoder = {"_target_": "ldm.autoencoder.kl.KL"}
    batch = {"image": torch.zeros(1, 3, 256, 256), "label": torch.zeros(1, dtype=torch.int64), "position": torch.arange(1)}
    with weightless():
        stage = build_stage(config).train()
        work, _ = cost(stage, batch)
        stage.objective.rate = 0.0
        whole, _ = cost(stage, batch)
    blocks = sum(p.numel() for p in stage.model.denoiser.backbone.blocks.parameters())
    assert stage.objective.of.layer < stage.model.denoiser.backbone.fuse[0]
    assert 600e6 < blocks < 700e6 and work < 0.65 * whole


@pytest.mark.parametrize(
    "words",
    [["experiment=speedrun/imagenet256", "size=tiny", TEACHER], ["experiment=speedrun/emoji", "condition.text.whiten=false"]],
    ids=["imagenet256", "emoji"],
)
def test_shrunken_it_takes_steps(words, runs):
    stage = build_stage(compose_config("train", [*words, f"runs={runs}"])).train()
    optimizer = torch.optim.Adam([p for p in stage.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(3):
        said = stage.losses(BATCH, Draw(0, BATCH["position"], 2))
        losses.append(said["loss"])
        optimizer.zero_grad()
        said["loss"].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and "align" in said
