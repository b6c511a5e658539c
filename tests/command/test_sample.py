"""`sample` on several processes: each draws its share, and the first writes what all drew."""

import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from helpers.training import diffusion
from ldm.build import ALLOWED
from ldm.command.sample import draw
from ldm.compose import CONFIGS, compose_config
from ldm.files.folder import save_model
from ldm.files.process import SRUN

WORDS = ["sampler.steps=2", "resolution=8", "batch=2", "ask.label=[1,2,3]"]


def plain(*words):
    return OmegaConf.to_container(compose_config("sample", ["model=m", *WORDS, *words]), resolve=True)


@pytest.mark.parametrize("world", [2, 4])
def test_shares_together_are_what_one_process_draws(world):
    """Also where there are fewer pictures than processes."""
    model, config = diffusion().model.eval(), plain()
    whole, asked = draw(model, {}, config, ALLOWED)
    parts = [draw(model, {}, config, ALLOWED, share=(rank, world)) for rank in range(world)]
    torch.testing.assert_close(torch.cat([images for images, _ in parts]), whole)
    assert whole.std() > 0 and all(told["seeds"] == asked["seeds"] == [0, 1, 2] for _, told in parts)


RECIPE = {
    "_target_": "ldm.build.assemble",
    "autoencoder": {"_target_": "ldm.autoencoder.identity.Identity"},
    "condition": {"label": {"_target_": "ldm.condition.label.Label", "classes": 9, "width": 8}},
    "backbone": {"_target_": "ldm.backbone.mlp.MLP", "_partial_": True, "size": 8, "width": 8},
    "schedule": {"_target_": "ldm.schedule.Linear"},
    "prediction": {"_target_": "ldm.prediction.Flow"},
    "level": {"_target_": "ldm.denoiser.LogRatio"},
}


@pytest.mark.slow
def test_two_tasks_of_srun_write_every_picture_once(tmp_path):
    """SLURM says who they are, and nobody where they meet; as one process draws them."""
    from ldm.build import build

    save_model(build(RECIPE).state_dict(), RECIPE, tmp_path / "model")
    words = [sys.executable, "sample.py", f"model={tmp_path / 'model'}", *WORDS]
    shared = {k: v for k, v in os.environ.items() if not k.startswith("MASTER_")} | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*words, f"out={tmp_path / 'one'}"], cwd=CONFIGS.parent, env=shared, check=True)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NODELIST": "localhost", SRUN[1]: "2"}
    start = [*words, f"out={tmp_path / 'two'}"]
    environments = [shared | job | {SRUN[0]: str(rank), SRUN[2]: str(rank)} for rank in range(2)]
    jobs = [subprocess.Popen(start, cwd=CONFIGS.parent, env=e, stdout=subprocess.PIPE) for e in environments]
    said = [job.communicate(timeout=900)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0] and b"3 pictures" in said[0] and not said[1]
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.png")}
    assert len(files) == 4 and files == {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*.png")}
