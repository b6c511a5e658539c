"""A scale for each condition, and what measures whether a condition was followed."""

import pytest
import torch

from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.guidance.per_condition import PerCondition
from ldm.metric.inpainting import Inpainting
from ldm.metric.layout_iou import LayoutIoU
from ldm.metric.map_iou import MapIoU
from ldm.metric.super_resolution import SuperResolution
from ldm.types import Cond

X, T = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
PARTS = {"map": 10.0, "text": 2.0, "size": 1.0}


class Sums:
    """A model that multiplies by the sum of what it is told, and counts the pictures it denoises."""

    def __init__(self):
        self.count = 0

    def denoiser(self, x_t, t, cond):
        self.count += len(x_t)
        return x_t * cond.vector[:, :, None, None]

    def tell(self, ask, only=None):
        told = sum(value for name, value in PARTS.items() if only is None or name in only)
        return Cond(vector=torch.full((2, 1), float(told)))


def test_each_condition_is_followed_at_its_own_scale():
    """D() + s_map (D(map) - D()) + s_text (D(map, text, rest) - D(map)), InstructPix2Pix's equation 3."""
    denoise = PerCondition({"map": 1.5, "text": 4.0})(Sums(), {})
    torch.testing.assert_close(denoise(X, T), X * (0 + 1.5 * 10 + 4.0 * (2 + 1)))


@pytest.mark.parametrize(
    "scales, copies", [({}, 1), ({"map": 1.0, "text": 1.0}, 1), ({"map": 2.0, "text": 2.0}, 2), ({"map": 1.0, "text": 3.0}, 2)]
)
def test_terms_that_cancel_cost_nothing(scales, copies):
    model = Sums()
    told = PerCondition(scales)(model, {})(X, T)
    assert model.count == 2 * copies
    if scales in ({}, {"map": 1.0, "text": 1.0}):
        assert torch.equal(told, Unguided()(Sums(), {})(X, T))


def test_one_condition_is_classifier_free_guidance():
    torch.testing.assert_close(PerCondition({"map": 3.0})(Sums(), {})(X, T), X * 3 * 13)

    class One(Sums):
        def tell(self, ask, only=None):
            return super().tell(ask, PARTS if only is None else only)

    torch.testing.assert_close(PerCondition({"map": 3.0})(One(), {})(X, T), CFG(3.0)(One(), {})(X, T))


def test_unknown_conditions_are_named():
    from ldm.condition.conditioner import Conditioner
    from ldm.condition.label import Label

    class Model:
        def tell(self, ask, only=None):
            return Conditioner({"label": Label(3, 4)})(ask, only=only)

    with pytest.raises(ValueError, match=r"\['label'\], not \['txet'\]"):
        PerCondition({"txet": 2.0, "label": 1.0})(Model(), {"label": torch.tensor([1])})


def test_a_checkpoint_of_other_conditions_is_refused():
    from ldm.training.diffusion import Diffusion

    stage = Diffusion.__new__(Diffusion)
    torch.nn.Module.__init__(stage)
    stage.recipe = {"condition": {"label": {}}}
    with pytest.raises(
        ValueError, match=r"conditions \['text', 'semantic'\], this run has \['label'\]: condition=\[text,semantic\]"
    ):
        stage.on_load_checkpoint({"recipe": {"condition": {"text": {}, "semantic": {}}}})
    stage.on_load_checkpoint({"recipe": {"condition": {"label": {"width": 3}}}})


# ---- metrics

RED, WHITE = (255, 0, 0), (255, 255, 255)


def numbers(metric, images, batch):
    return {name: estimate.value for name, estimate in metric.compute(metric.look(images, batch), None).items()}


def half_red(count=2, size=8, columns=4):
    images = torch.ones(count, 3, size, size)
    images[:, 1:, :, :columns] = -1
    return images


def test_map_iou_is_one_for_the_map_itself_and_counts_areas():
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[:, :, :4] = 2
    batch, metric = {"map": labels, "image": half_red()}, MapIoU([WHITE, WHITE, RED])
    assert numbers(metric, half_red(), batch) == {"map_iou": 1.0, "map_iou_real": 1.0}
    labels[:, 0, 7] = 1
    assert numbers(metric, half_red(), batch)["map_iou"] == 1.0, "labels of one colour cannot be told apart"
    assert numbers(metric, half_red(columns=2), batch)["map_iou"] == pytest.approx((16 / 32 + 32 / 48) / 2)
    with pytest.raises(ValueError, match=r"\+data\.fields\.map=map\.png"):
        metric.look(half_red(), {"image": half_red()})


def test_layout_iou_is_of_the_box_and_its_colours_region():
    batch = {"boxes": [[[1, 0.0, 0.0, 0.5, 1.0]], [[1, 0.0, 0.0, 1.0, 1.0], [0, 0.5, 0.0, 1.0, 1.0]]], "image": half_red()}
    rows = LayoutIoU([WHITE, RED]).look(half_red(columns=2), batch)
    torch.testing.assert_close(rows["iou"], torch.tensor([0.5, (16 / 64 + 32 / 48) / 2]))
    torch.testing.assert_close(rows["real"], torch.tensor([1.0, (32 / 64 + 1) / 2]))
    told = LayoutIoU([WHITE, RED]).compute({"iou": torch.tensor([0.5, float("nan")]), "real": torch.ones(2)}, None)
    assert told["layout_iou"].value == 0.5


def test_inpainting_is_judged_inside_the_hole():
    real, mask = torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    real[..., 4:], mask[..., 4:] = 0.5, 1
    drawn = real + torch.where(mask > 0, 0.1, 0.02)
    told = numbers(Inpainting(), drawn, {"image": real, "mask": mask})
    assert told["inpainting_psnr"] == pytest.approx(10 * torch.tensor(4 / 0.01).log10().item(), abs=1e-3)
    assert told["inpainting_known_psnr"] == pytest.approx(10 * torch.tensor(4 / 0.0004).log10().item(), abs=1e-3)
    assert told["inpainting_psnr_of_mean_colour"] == pytest.approx(10 * torch.tensor(4 / 0.25).log10().item(), abs=1e-3)
    assert told["inpainting_gain"] == pytest.approx(told["inpainting_psnr"] - told["inpainting_psnr_of_mean_colour"])


def test_super_resolution_is_held_against_bicubic(clip_folder):
    low = torch.rand(2, 3, 8, 8) * 2 - 1
    up = torch.nn.functional.interpolate(low, (32, 32), mode="bicubic").clamp(-1, 1)
    real = (up + 0.1 * torch.randn(2, 3, 32, 32)).clamp(-1, 1)
    metric = SuperResolution(f"local-dir:{clip_folder}")
    same = numbers(metric, up, {"image": real, "low": low})
    assert same["super_resolution_gain"] == 0 and same["super_resolution_psnr"] == same["bicubic_psnr"]
    best = numbers(metric, real, {"image": real, "low": low})
    assert best["super_resolution_gain"] > 20 and best["super_resolution_distance"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("metric", [Inpainting(), LayoutIoU([WHITE]), MapIoU([WHITE])], ids=lambda m: type(m).__name__)
def test_metrics_name_the_field_they_lack(metric):
    with pytest.raises(ValueError, match="reads the field"):
        metric.look(half_red(), {"image": half_red()})
