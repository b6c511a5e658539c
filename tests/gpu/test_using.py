"""Drawing, measuring and encoding on a GPU are those on a CPU."""

import tarfile
from io import BytesIO

import numpy as np
import pytest
import torch

from helpers.ranks import measured
from helpers.training import diffusion, small
from ldm.autoencoder.kl import KL
from ldm.data.batch.latents import write_latents
from ldm.drawing.generate import compile_backbone, generate
from ldm.guidance.cfg import CFG
from ldm.sampler.ddim import DDIM

COUNT = 6


def drawn(device, batches, prepare=lambda net: None):
    """COUNT pictures of one model, in batches of these sizes."""
    model = diffusion().model.eval().to(device)
    prepare(model.denoiser.backbone)
    pictures, first = [], 0
    for size in batches:
        seeds = range(first, first + size)
        ask = {"label": torch.tensor([seed % 9 for seed in seeds])}
        pictures.append(generate(model, ask, DDIM(4), CFG(2.0), seeds, (8, 8)).cpu())
        first += size
    return torch.cat(pictures)


def test_a_picture_is_the_processors_whatever_its_batch(device):
    there = drawn(device, [COUNT])
    torch.testing.assert_close(there, drawn("cpu", [COUNT]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn(device, [4, 2]), there, atol=1e-4, rtol=1e-4)


def test_compiled_drawing_is_the_plain_one(device):
    """By inductor and captured graphs, for two sizes of a batch."""
    if device.type == "cpu":
        pytest.skip("compiled by inductor, which takes minutes on a CPU")
    torch.testing.assert_close(drawn(device, [4, 2], compile_backbone), drawn(device, [COUNT]), atol=1e-3, rtol=1e-3)


def test_a_metric_in_training_is_the_processors(on, emoji_root, tmp_path):
    there, here = (measured(emoji_root, tmp_path / name, **how) for name, how in (("gpu", on), ("cpu", {"accelerator": "cpu"})))
    assert there == pytest.approx(here, abs=1e-3)


def test_latents_made_ahead_are_the_processors(device, emoji_root, tmp_path):
    data = small(emoji_root, size=16)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    net = KL(channels=2, width=8, mult=(1, 2), res_blocks=1, groups=4).eval()

    def moments(name, where):
        write_latents(net.to(where), data, "val", tmp_path / name, 8, where)
        with tarfile.open(tmp_path / name / "00000.tar") as tar:
            arrays = [np.load(BytesIO(tar.extractfile(m).read())) for m in tar.getmembers() if m.name.endswith("moments.npy")]
        return torch.from_numpy(np.stack(arrays)).float()

    torch.testing.assert_close(moments("gpu", device), moments("cpu", torch.device("cpu")), atol=1e-4, rtol=1e-4)
