"""What measures whether a condition was followed, and a checkpoint of other conditions."""

import pytest
import torch

from ldm.metric.classifier import Classifier
from ldm.metric.inpainting import Inpainting
from ldm.metric.layout_iou import LayoutIoU
from ldm.metric.map_iou import MapIoU
from ldm.metric.super_resolution import SuperResolution


def test_a_checkpoint_of_other_conditions_is_refused():
    from ldm.training.stage.diffusion import Diffusion

    stage = Diffusion.__new__(Diffusion)
    torch.nn.Module.__init__(stage)
    stage.recipe, stage.frozen = {"condition": {"label": {}}}, ()
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


class Reals:
    """A reference of given rows, which counts what is made of them."""

    def __init__(self, rows):
        self.given, self.made = rows, {}

    def kept(self, name, make):
        self.made[name] = self.made.get(name) or make(self.given)
        return self.made[name]


def test_a_classifier_learns_the_training_pictures_once_and_judges_by_the_request():
    """Two classes, a stroke that lies or stands: no colour tells them apart, and mirroring keeps them."""
    generator = torch.Generator().manual_seed(0)

    def strokes(count):
        label = torch.randint(2, (count,), generator=generator)
        images = torch.ones(count, 3, 16, 16)
        for image, kind, place in zip(images, label, torch.randint(4, 11, (count,), generator=generator)):
            (image if kind else image.transpose(1, 2))[:, place : place + 2] = -1
        return images, label

    metric = Classifier(side=16, steps=60, batch=16, width=8)
    images, label = strokes(60)
    reals = Reals(metric.look(images, {"label": label, "image": images, "split": "train"}))
    assert "real" not in reals.given
    images, label = strokes(20)
    batch = {"label": label, "image": images, "split": "val"}
    told = metric.compute(metric.look(images, batch), reals)
    assert told["classifier_accuracy"].value > 0.9 and told["classifier_accuracy_real"].value > 0.9
    wrong = metric.compute(metric.look(images, {"label": 1 - label}), reals)
    assert set(wrong) == {"classifier_accuracy"} and wrong["classifier_accuracy"].value < 0.1 and len(metric.right) == 20
    (weights,) = reals.made.values()
    again = metric._trained(reals.given)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    with pytest.raises(ValueError, match=r"classifier reads the field `label`.*\+data\.fields\.label=cls"):
        metric.look(images, {"image": images})


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
