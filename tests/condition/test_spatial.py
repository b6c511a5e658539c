"""Maps, holes, low resolution, boxes: what is told at latent resolution, made from the key, read from files."""

import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.condition._degrade import bicubic, bsr_light
from ldm.condition._masks import key_generator, random_mask
from ldm.condition.embedding import Embedding
from ldm.condition.inpaint import Inpaint
from ldm.condition.layout import Layout, boxes_of, in_the_cut
from ldm.condition.low_resolution import LowResolution
from ldm.condition.picture import Picture
from ldm.condition.semantic import Semantic
from ldm.condition.text import Text
from ldm.condition.transcript import Transcript
from ldm.conditioner import Conditioner
from ldm.data.shard.write import write_shards
from ldm.data.shards import Shards
from ldm.drawing.generate import paste_known
from ldm.drawing.request import _read_image, read_request, write_pictures
from ldm.model import LatentModel
from ldm.types import Draw, Moments, Widths


class Halves(torch.nn.Module):
    """An autoencoder of factor 2: the mean of each 2x2."""

    channels, factor = 3, 2

    def encode(self, images):
        mean = torch.nn.functional.avg_pool2d(images, 2)
        return Moments(mean, torch.zeros_like(mean))

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=2.0)


def no(count):
    return torch.zeros(count, dtype=torch.bool)


def pictures(count=2, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draw(positions, seed=0):
    return Draw(seed, torch.tensor(positions), len(positions))


# ---- semantic maps


def test_a_thin_region_does_not_vanish():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[0, :, 3] = 2
    told = Semantic(Halves(), classes=3)(labels, no(1)).spatial
    assert told.shape == (1, 3, 4, 4)
    torch.testing.assert_close(told.sum(1), torch.ones(1, 4, 4))
    torch.testing.assert_close(told[0, 2], torch.tensor([0.0, 0.5, 0.0, 0.0]).expand(4, 4))


def test_learned_labels_are_the_mean_of_their_vectors():
    semantic, labels = Semantic(Halves(), classes=5, width=4), torch.randint(5, (2, 8, 8))
    each = semantic.table[labels].permute(0, 3, 1, 2)
    torch.testing.assert_close(semantic(labels, no(2)).spatial, torch.nn.functional.avg_pool2d(each, 2))
    assert not semantic(labels, torch.tensor([True, False])).spatial[0].any() and semantic.widths == Widths(spatial=4)


def test_unknown_labels_and_odd_sizes_are_named():
    semantic = Semantic(Halves(), classes=3)
    with pytest.raises(
        ValueError, match=r"'map' has labels from 0 to 255; this model knows 0 to 2.*condition\.semantic\.classes"
    ):
        semantic(torch.tensor([[[0, 255], [1, 1]]]), no(1))
    with pytest.raises(ValueError, match=r"\(3, 4\).*factor 2"):
        semantic(torch.zeros(1, 3, 4, dtype=torch.int64), no(1))


def test_maps_of_another_size_than_the_latents_are_refused():
    from ldm.backbone.unet import UNet
    from ldm.denoiser import Denoiser, LogRatio
    from ldm.prediction import Flow
    from ldm.schedule import Linear
    from ldm.types import Cond

    net = UNet(3, Widths(spatial=1), width=8, mult=(1,), res_blocks=1, depth=(0,), middle_depth=0, groups=4)
    with pytest.raises(ValueError, match=r"maps are of \(8, 8\) latent pixels, the latents of \(4, 4\)"):
        Denoiser(net, Linear(), Flow(), LogRatio())(
            torch.zeros(1, 3, 4, 4), torch.tensor(0.5), Cond(spatial=torch.zeros(1, 1, 8, 8))
        )


def test_other_pictures_are_encoded_or_pooled():
    x = pictures()
    for how, told in (("encoded", Halves().encode(x).mean), ("pooled", torch.nn.functional.avg_pool2d(x, 2))):
        picture = Picture(Halves(), how=how)
        torch.testing.assert_close(picture(x, no(2)).spatial, told)
        assert not picture(x, ~no(2)).spatial.any()


# ---- inpainting


def test_the_hole_is_told_as_stable_diffusion_tells_it():
    x, mask = pictures(1), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    told = Inpaint(Halves())([x, mask], no(1)).spatial
    assert told.shape == (1, 4, 4, 4)
    assert torch.equal(told[0, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4)), "the mask first, 1 where to repaint"
    torch.testing.assert_close(told[:, 1:], Halves().encode(x * (1 - mask)).mean)
    assert torch.equal(told, Inpaint(Halves())([torch.where(mask > 0, 5.0, x), mask], no(1)).spatial), "nothing of the hole leaks"


def test_masks_depend_on_the_key_and_in_training_on_the_position():
    conditioner = Conditioner({"inpaint": Inpaint(Halves())})
    batch = {"image": pictures(4, 16), "key": list("abcd")}
    masks = conditioner.fill(batch)["mask"]
    assert torch.equal(masks, conditioner.fill(batch)["mask"])
    other = conditioner.fill({"image": batch["image"][2:], "key": ["c", "d"]})["mask"]
    assert torch.equal(masks[2:], other)
    trained = [conditioner.fill(batch, draw([p, p + 1, p + 2, p + 3]))["mask"] for p in (0, 4, 0)]
    assert torch.equal(trained[0], trained[2]) and not torch.equal(trained[0], trained[1])
    assert torch.equal(conditioner.fill(batch | {"mask": 1 - masks})["mask"], 1 - masks), "the shards' masks come first"
    assert torch.equal(conditioner(batch).spatial, conditioner(batch, only=()).spatial), "never dropped"


def test_masks_are_of_many_shapes_and_sizes():
    masks = torch.stack([random_mask((32, 24), key_generator(str(i))) for i in range(200)])
    share = masks.mean((1, 2, 3))
    assert masks.shape == (200, 1, 32, 24) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert share.min() > 0 and share.max() < 1 and 0.35 < share.mean() < 0.6 and share.std() > 0.15
    assert masks.mean(0).min() > 0.2, "no place is never repainted"


@pytest.mark.parametrize("value, said", [(0.0, r"masks are 0 everywhere \(data\.fields\.mask\)"), (0.5, "0 .keep. and 1")])
def test_masks_that_say_nothing_are_refused(value, said):
    with pytest.raises(ValueError, match=said):
        Inpaint(Halves())([pictures(1), torch.full((1, 1, 8, 8), value)], no(1))
    with pytest.raises(ValueError, match="does not fit"):
        Inpaint(Halves())([pictures(1), torch.zeros(1, 1, 4, 8)], no(1))


@pytest.mark.parametrize("member", ["mask.png", "map.mask.png"])
def test_masks_come_with_the_shards(member, tmp_path):
    """White, or any label but 0, is repainted; a mask of everything is one too (Stable Diffusion drew a quarter so)."""
    holes = np.zeros((4, 16, 16), np.uint8)
    holes[0, :, 8:], holes[1, :8], holes[2, 4:8, 4:8], holes[3] = 255, 255, 255, 255

    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    photo = png(np.zeros((16, 16, 3), np.uint8))
    write_shards(
        ({"__key__": f"{i}", "png": photo, member: png(hole)} for i, hole in enumerate(holes)), tmp_path / "shards", per_shard=10
    )
    data = Shards([str(tmp_path / "shards")], fields={"image": "png", "mask": member}, size=16, batch=4)
    data.setup()
    batch, conditioner = data.on_after_batch_transfer(data.rows("train", range(4))), Conditioner({"inpaint": Inpaint(Halves())})
    assert torch.equal(conditioner.fill(batch)["mask"][:, 0], torch.from_numpy(holes > 0).float())
    assert torch.equal(conditioner(batch).spatial[:, 0], torch.from_numpy(holes[:, ::2, ::2] > 0).float())


def test_what_is_known_comes_back_to_the_bit_or_through_the_autoencoder():
    x, drawn, mask = pictures(1), pictures(1) * 0.5, torch.zeros(1, 1, 8, 8)
    mask[..., 2:4, 2:4] = 1
    autoencoder, keep = Halves(), (mask == 0).expand_as(x)
    paints, other = (
        LatentModel(autoencoder, Conditioner(conditions), torch.nn.Identity())
        for conditions in ({"hole": Inpaint(autoencoder, mask="hole")}, {"depth": Picture(autoencoder, "image")})
    )
    ask = {"image": x, "hole": mask}
    pasted = paste_known(paints, ask, drawn, "pixels")
    assert torch.equal(pasted[keep], x[keep]) and torch.equal(pasted[~keep], drawn[~keep])
    assert torch.equal(paste_known(paints, ask, drawn, "latents"), autoencoder.decode(autoencoder.encode(pasted).mean))
    assert torch.equal(paste_known(paints, ask, drawn, None), drawn)
    assert torch.equal(paste_known(other, ask, drawn, "latents"), drawn)
    for model, how, said in ((other, "pixels", "inpainting models.*depth"), (paints, "true", "latents, pixels or null")):
        with pytest.raises(ValueError, match=said):
            paste_known(model, ask, drawn, how)


# ---- super-resolution


def test_low_resolution_is_told_as_it_is_or_brought_to_the_latents_size():
    x = pictures(1, 8)
    conditioner = Conditioner({"low_resolution": LowResolution(Halves(), scale=2)})
    low = torch.nn.functional.interpolate(x, (4, 4), mode="bicubic", antialias=True).clamp(-1, 1)
    torch.testing.assert_close(conditioner({"image": x}).spatial, low)
    larger = Conditioner({"low_resolution": LowResolution(Halves(), scale=4)})({"low": torch.full((1, 3, 2, 2), 0.3)}).spatial
    torch.testing.assert_close(larger, torch.full((1, 3, 4, 4), 0.3))
    assert not conditioner({"image": x}, only=()).spatial.any()
    with pytest.raises(ValueError, match="6x6 pixels is no multiple of 4"):
        bicubic(pictures(1, 6), 4, torch.Generator())


def test_noise_augmentation_adds_the_noise_that_it_tells():
    low_resolution = LowResolution(Halves(), scale=2, noise=0.5, rate=0.0)
    conditioner = Conditioner({"low": low_resolution})
    batch = {"image": torch.full((512, 3, 8, 8), 0.5), "position": torch.arange(512)}
    filled = conditioner.fill(batch, draw(list(range(512))))
    level, spatial = filled["level"], conditioner(batch, draw(list(range(512)))).spatial
    assert 0 <= level.min() and level.max() < 0.5 and level.mean().item() == pytest.approx(0.25, abs=0.03)
    left = (spatial - (1 - level.square()).sqrt()[:, None, None, None] * 0.5) / level[:, None, None, None]
    assert left.std().item() == pytest.approx(1, abs=0.03) and abs(left.mean().item()) < 0.03
    asked = conditioner({"low": torch.zeros(2, 3, 4, 4), "level": torch.tensor([0.0, 0.5])})
    assert not asked.spatial[0].any() and asked.spatial[1].std() > 0.3 and not torch.equal(*asked.vector)
    assert torch.equal(conditioner({"low": torch.zeros(1, 3, 4, 4)}).vector[0], asked.vector[0]), "0 where it is not said"


def test_the_light_damage_is_light_and_follows_its_generator():
    x = torch.nn.functional.interpolate(pictures(1, 4), (64, 64), mode="bicubic").clamp(-1, 1)
    lows = [bsr_light(x, 4, key_generator(str(i))) for i in range(20)]
    assert all(low.shape == (1, 3, 16, 16) and low.abs().max() <= 1 for low in lows)
    assert torch.equal(lows[3], bsr_light(x, 4, key_generator("3"))) and not torch.equal(lows[3], lows[4])
    plain = bicubic(x, 4, torch.Generator())
    psnr = [(10 * torch.log10(4 / (low - plain).square().mean())).item() for low in lows]
    assert 20 < min(psnr) and max(psnr) < 50


# ---- layout


def test_boxes_of_a_map_are_its_labels_extents():
    labels = torch.zeros(10, 20, dtype=torch.int64)
    labels[2:5, 4:10], labels[9, 19] = 7, 3
    assert boxes_of(labels) == [[7.0, 0.2, 0.2, 0.5, 0.5]]
    assert [3.0, 0.95, 0.9, 1.0, 1.0] in boxes_of(labels, least=0.0)


def test_layouts_are_read_from_records_or_maps_and_their_order_does_not_matter():
    layout = Layout(8, width=16, depth=1, heads=2, most=3).eval()
    conditioner = Conditioner({"layout": layout})
    boxes = [[1, 0.0, 0.0, 0.5, 1.0], [2, 0.5, 0.0, 1.0, 0.5]]
    told = conditioner({"json": [{"boxes": boxes}, {"boxes": []}]})
    assert told.tokens.shape == (2, 4, 16) and told.mask.tolist() == [[True, True, True, False], [True, False, False, False]]
    torch.testing.assert_close(conditioner({"boxes": [boxes[::-1]]}).tokens[0, :3], told.tokens[0, :3])
    null = conditioner({"boxes": [boxes]}, only=())
    torch.testing.assert_close(null.tokens[0, 0], told.tokens[1, 0])
    assert null.mask.sum() == 1
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    labels[0, :, :2] = 1
    same = conditioner({"map": labels}), conditioner({"boxes": [[[1, 0, 0, 0.5, 1]]]})
    assert torch.equal(same[0].tokens, same[1].tokens)
    crowd = conditioner({"boxes": [[[1, 0, 0, 0.1, 0.1 * i] for i in range(1, 9)]]})
    largest = conditioner({"boxes": [[[1, 0, 0, 0.1, 0.1 * i] for i in (8, 7, 6)]]})
    assert torch.equal(crowd.tokens, largest.tokens)


def test_boxes_follow_the_crop():
    record = {"width": 200, "height": 100, "boxes": [[1, 0.25, 0.0, 0.5, 1.0], [2, 0.0, 0.0, 0.2, 1.0], [3, 0.5, 0.5, 1.0, 1.0]]}
    assert in_the_cut(record) == [[1, 0.0, 0.0, 0.5, 1.0], [3, 0.5, 0.5, 1.0, 1.0]]
    assert in_the_cut(record, mirrored=True) == [[1, 0.5, 0.0, 1.0, 1.0], [3, 0.0, 0.5, 0.5, 1.0]]
    assert in_the_cut({"boxes": [[1, 0.1, 0.2, 0.3, 0.4]]}) == [[1, 0.1, 0.2, 0.3, 0.4]]
    assert in_the_cut(record, 50, 100, 0, 0) == record["boxes"]  # a bucket of the picture's own shape: nothing is cut
    assert in_the_cut(record, 50, 50, 0, 0) == [[1, 0.5, 0.0, 1.0, 1.0], [2, 0.0, 0.0, 0.4, 1.0]]  # the left half


@pytest.mark.parametrize("how", [{"crop": "random", "flip": 0.5}, {"buckets": [[32, 32], [24, 48]]}, {}])
def test_boxes_lie_where_the_pictures_do(how, tmp_path):
    """Whatever is cut or mirrored: what is black in the picture is what the box says."""
    box = [1, 0.25, 0.5, 0.5, 0.75]
    for number, size in enumerate([(64, 64), (128, 64)]):
        image = np.full((*size[::-1], 3), 255, np.uint8)
        left, top, right, bottom = (round(e * s) for e, s in zip(box[1:], size * 2))
        image[top:bottom, left:right] = 0
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        record = {"width": size[0], "height": size[1], "boxes": [box]}
        samples = ({"__key__": f"{i:03d}", "png": png.getvalue(), "json": record} for i in range(number, 8, 2))
        write_shards(samples, tmp_path / str(number), per_shard=10)
    fields = {"image": "png", "json": "json"}
    data = Shards([str(tmp_path / "0"), str(tmp_path / "1")], fields=fields, size=32, batch=4, **how)
    layout, seen = Layout(2, width=8, depth=1, heads=2), 0
    for _, batch in zip(range(4), data.train_dataloader()):
        batch = data.on_after_batch_transfer(batch)
        for image, boxes in zip(batch["image"], layout.derive(batch, None)["boxes"]):
            rows, columns = (image.mean(0) < 0).nonzero(as_tuple=True)
            if boxes and len(rows):
                height, width = image.shape[1:]
                found = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
                torch.testing.assert_close(torch.tensor(boxes[0][1:]), torch.stack(found), atol=1.5 / min(height, width), rtol=0)
                seen += 1
    assert seen > 10


BAD_BOXES = [[8, 0, 0, 1, 1], [1, 0.6, 0, 0.5, 1], [1, 0, 0, 1.2, 1], [1, 0, 0, 1], [1.5, 0, 0, 1, 1], ["fox", 0, 0, 1, 1], 6]


@pytest.mark.parametrize("box", [*BAD_BOXES, [1, 30, 40, 200, 300], [1, 0, 0, float("nan"), 1]])
def test_boxes_out_of_range_are_named(box):
    """Those of records too, before they are cut: nothing of a box in pixels would be left."""
    layout, said = Layout(8, width=16, depth=1, heads=2), r"Found the box .*class from 0 to 7 .*left < right"
    for ask in (
        lambda: layout([[box]], no(1)),
        lambda: layout.read("boxes", [box], (8, 8)),
        lambda: layout.derive({"json": [{"boxes": [box], "width": 640, "height": 480}]}, None),
    ):
        with pytest.raises(ValueError, match=said):
            ask()


def test_boxes_of_records_may_be_missing_flat_or_outside_by_a_rounding_error():
    layout = Layout(8, width=16, depth=1, heads=2)
    told = layout.derive({"json": [{"boxes": [[1, -1e-7, 0.0, 1.0000001, 0.5], [1, 0.5, 0, 0.5, 1]]}, {"boxes": []}]}, None)
    assert told == {"boxes": [[[1.0, 0.0, 0.0, 1.0, 0.5]], []]}
    with pytest.raises(ValueError, match=r"Found the box \[1, 0\.5, 0, 0\.5, 1\]"):
        layout.read("boxes", [[1, 0.5, 0, 0.5, 1]], (8, 8))  # in a request, one without area is a mistake
    with pytest.raises(ValueError, match=r"reads `boxes` in the json.*found None in one with \['url'\].*Write \[\] where"):
        layout.derive({"json": [{"boxes": []}, {"url": "x"}]}, None)
    labels = torch.ones(1, 4, 4, dtype=torch.int64)
    assert layout.derive({"json": [{"url": "x"}], "map": labels}, None) == {"boxes": [[[1.0, 0.0, 0.0, 1.0, 1.0]]]}


def test_boxes_are_asked_for_in_lists_or_files(tmp_path):
    layout, one, two = Layout(8, width=16, depth=1, heads=2), [1, 0, 0, 0.5, 1], [2, 0.5, 0, 1, 1]
    (tmp_path / "a.json").write_text(json.dumps([one, two]))
    (tmp_path / "b.json").write_text(json.dumps([[one], []]))
    (tmp_path / "broken.json").write_text("[[1, 0")
    paths = [f"{tmp_path}/{name}.json" for name in ("a", "b")]
    cases = [
        ([one, two], [[one, two]]),
        ([[one], [two]], [[one], [two]]),
        ([], [[]]),
        ([[]], [[]]),
        (paths, [[one, two], [one], []]),
    ]
    for asked, rows in cases:
        assert layout.read("boxes", asked, (8, 8)) == rows
    with pytest.raises(FileNotFoundError, match=r"ask\.boxes=6: there is no such file; wanted \[\[class, left"):
        layout.read("boxes", ["6"], (8, 8))
    with pytest.raises(ValueError, match=r"ask\.boxes=.*broken\.json is no JSON"):
        layout.read("boxes", [f"{tmp_path}/broken.json"], (8, 8))


# ---- pictures and words


def test_the_image_embedding_is_open_clips(clip_folder):
    from ldm.tower.clip import load_clip, preprocess

    x, clip = pictures(2, 32), load_clip(f"local-dir:{clip_folder}", None, "x")
    embedding = Embedding(f"local-dir:{clip_folder}")
    wanted = clip.encode_image(preprocess(clip.visual, x), normalize=True)
    told = embedding(x, torch.tensor([False, True])).tokens
    torch.testing.assert_close(told[0, 0], wanted[0] * 4)
    assert not told[1].any() and embedding.frozen == ("tower",) and embedding.widths == Widths(tokens=16)


def test_a_text_model_of_its_own_ignores_padding_and_learns():
    transcript = Transcript(width=16, depth=1, heads=2, length=8)
    short, long = (Transcript(width=16, depth=1, heads=2, length=n) for n in (8, 12))
    long.load_state_dict(short.state_dict() | {"places": torch.cat((short.places, torch.randn(4, 16)))})
    a, b = (t.eval()(["a fox"], no(1)) for t in (short, long))
    torch.testing.assert_close(a.tokens[a.mask], b.tokens[b.mask])
    cond = transcript(["a fox", "a cat"], torch.tensor([False, True]))
    torch.testing.assert_close(cond.tokens[1][cond.mask[1]], transcript([""], no(1)).tokens[0][cond.mask[1]])
    cond.tokens.sum().backward()
    assert transcript.words.weight.grad is not None


def test_what_a_prompt_loses_is_said(clip_folder):
    for reader, length in ((Text(f"local-dir:{clip_folder}"), 12), (Transcript(width=16, depth=1, heads=2, length=12), 12)):
        with pytest.warns(UserWarning, match="14 tokens do not fit into 10; cut off: 'k l m n"):
            reader.read("caption", [" ".join("abcdefghijklmn")], (8, 8))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert reader.read("caption", ["a fox"], (8, 8)) == ["a fox"]
        assert length == 12


# ---- requests


@pytest.fixture
def files(tmp_path):
    """photo.png 20x10 red, left half blue; mask.png white on its right half; maps/a.png with labels 0 and 2; small.png."""
    photo = np.zeros((10, 20, 3), dtype=np.uint8)
    photo[..., 0], photo[:, :10] = 255, (0, 0, 255)
    mask, labels = np.zeros((10, 20), dtype=np.uint8), np.zeros((8, 8), dtype=np.uint8)
    mask[:, 10:], labels[4:] = 255, 2
    (tmp_path / "maps").mkdir()
    images = {"photo": photo, "mask": mask, "maps/a": labels, "maps/b": labels * 0, "small": photo[:4, :4]}
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def model_of(**embedders):
    from ldm.denoiser import Denoiser, LogRatio
    from ldm.prediction import Flow
    from ldm.schedule import Linear

    return LatentModel(Halves(), Conditioner(embedders), Denoiser(torch.nn.Identity(), Linear(), Flow(), LogRatio()))


def test_pictures_and_masks_are_read_cropped_and_scaled(files):
    model = model_of(inpaint=Inpaint(Halves()))
    ask, count = read_request(
        {"ask": {"image": f"{files}/photo.png", "mask": f"{files}/mask.png"}, "resolution": 8, "count": 2}, model
    )
    assert count == 2 and ask["image"].shape == (2, 3, 8, 8) and ask["mask"].shape == (2, 1, 8, 8)
    torch.testing.assert_close(ask["image"][0, :, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    assert torch.equal(ask["mask"][0, 0], torch.tensor([0.0] * 4 + [1.0] * 4).expand(8, 8))
    shown = model.conditioner.show(ask)["inpaint"]
    assert shown.shape == (2, 3, 8, 8) and not shown[..., 4:].any()


def test_a_picture_to_begin_from_is_upright_in_srgb_and_whole(files):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGBA", (16, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 16, 4))
    picture.save(files / "turned.png", exif=exif)
    read = _read_image(str(files / "turned.png"), "init", "RGB", (16, 8))[0]
    assert read[:, :, 6:].mean((1, 2)).tolist() == [0, 0, 1] and read[:, :, :2].min() == 1, "transparent parts are white"
    (files / "cut.png").write_bytes((files / "turned.png").read_bytes()[:99])
    for name in ("cut.png", "boxes"):
        (files / "boxes").write_text("[]")
        with pytest.raises(ValueError, match=r"init=\S+ is no whole picture"):
            _read_image(str(files / name), "init", "RGB", (8, 8))


def test_folders_of_maps_names_and_defaults(files):
    from ldm.condition.label import Label
    from ldm.condition.number import Number

    numbers = Number({"target_height": "height"}, width=4)
    model = model_of(semantic=Semantic(Halves(), 3), label=Label(["Fox", "Cat"], 4), number=numbers)
    ask, count = read_request({"ask": {"map": f"{files}/maps", "label": "cat"}, "resolution": [4, 8]}, model)
    assert count == 2 and ask["map"].shape == (2, 4, 8) and ask["map"][0].unique().tolist() == [0, 2]
    assert ask["label"].tolist() == [1, 1] and ask["target_height"].tolist() == [4.0, 4.0]
    model.condition(ask)


def test_small_pictures_and_boxes(files):
    model = model_of(low=LowResolution(Halves(), scale=2, noise=0.2), layout=Layout(8, width=8, depth=1, heads=2))
    (files / "boxes.json").write_text("[[1, 0, 0, 1, 1]]")
    ask, count = read_request({"ask": {"low": f"{files}/small.png", "boxes": f"{files}/boxes.json"}, "resolution": 8}, model)
    assert count == 1 and ask["low"].shape == (1, 3, 4, 4) and ask["level"].tolist() == [0.0]
    assert model.condition(ask).spatial.shape == (1, 3, 4, 4) and model.conditioner.show(ask)["layout"].shape == (1, 3, 64, 64)


def test_what_cannot_be_read_is_named(files):
    model = model_of(semantic=Semantic(Halves(), 3))
    (files / "broken.png").write_bytes(b"no picture")
    cases = [
        ({"map": f"{files}/none.png"}, FileNotFoundError, r"ask\.map=.*none\.png: there is no such picture"),
        (
            {"map": f"{files}/photo.png"},
            ValueError,
            r"ask\.map=.*photo\.png is a picture of mode RGB; a label map has one channel",
        ),
        ({"map": f"{files}/broken.png"}, ValueError, r"ask\.map=.*broken\.png is no whole"),
        ({"depth": "x"}, ValueError, r"asked by ask\.map=\.\.\.; found \['depth'\]"),
        ({}, ValueError, r"asked by ask\.map=\.\.\.; found nothing"),
    ]
    for ask, error, said in cases:
        with pytest.raises(error, match=said):
            read_request({"ask": ask, "resolution": 8}, model)
    with pytest.raises(ValueError, match=r"negative='blurry' is for models that read captions.*ask\.map"):
        read_request({"ask": {"map": f"{files}/maps/a.png"}, "negative": "blurry", "resolution": 8}, model)


def test_a_mask_lies_on_its_picture(files):
    """Each is cut in its middle: a square mask of a wide picture would be stretched over less of it than was meant."""
    for name, size in (("square", (10, 10)), ("large", (41, 20)), ("upright", (10, 20))):
        Image.open(files / "mask.png").resize(size).save(files / f"{name}.png", exif=Image.Exif())
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.open(files / "mask.png").rotate(90, expand=True).save(files / "turned.png", exif=exif)

    def ask(*masks):
        given = {"image": f"{files}/photo.png", "mask": [f"{files}/{m}.png" for m in masks]}
        return read_request({"ask": given, "resolution": 8}, model_of(inpaint=Inpaint(Halves())))[0]

    assert torch.equal(ask("mask", "turned")["mask"][0], ask("turned")["mask"][0]) and len(ask("large")["mask"]) == 1
    for masks in (["square"], ["mask", "upright"]):
        with pytest.raises(ValueError, match=rf"photo\.png is 20x10 and ask\.mask=\S+{masks[-1]}\.png is 10x.*same shape"):
            ask(*masks)


@pytest.mark.parametrize("level", ["much", -0.1, 0.3, "nan", None])
def test_a_level_that_was_never_trained_is_named(level, files):
    model = model_of(low=LowResolution(Halves(), scale=2, noise=0.2))
    with pytest.raises(ValueError, match=rf"ask\.level={level}: wanted numbers from 0 to 0\.2"):
        read_request({"ask": {"low": f"{files}/small.png", "level": level}, "resolution": 8}, model)


@pytest.mark.parametrize("count", [-1, 0])
def test_as_many_pictures_as_there_are(count, files):
    with pytest.raises(ValueError, match=rf"count={count}: wanted 1 or more"):
        read_request({"ask": {"map": f"{files}/maps"}, "count": count, "resolution": 8}, model_of(map=Semantic(Halves(), 3)))
    with pytest.raises(ValueError, match=r"ask\.map=\[\]: nothing is asked for"):
        read_request({"ask": {"map": []}, "resolution": 8}, model_of(map=Semantic(Halves(), 3)))


def test_a_mask_that_says_nothing_is_named(files):
    for name, value, said in (("black", 0, "empty.*0 to 0"), ("white", 255, "full.*255 to 255"), ("ones", 1, "empty.*1 to 1")):
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(files / f"{name}.png")
        with pytest.raises(ValueError, match=rf"ask\.mask=\S+{name}\.png is {said}.*perhaps it is inverted"):
            read_request({"ask": {"mask": f"{files}/{name}.png"}, "resolution": 8}, model_of(inpaint=Inpaint(Halves())))


def test_each_picture_lies_beside_what_it_was_told(tmp_path):
    write_pictures(
        torch.zeros(2, 3, 8, 8), tmp_path, {"asked": {"map": torch.zeros(2, 8, 8)}}, {"semantic": torch.ones(2, 3, 4, 4)}
    )
    names = {f.name for f in tmp_path.iterdir()}
    assert names == {"00000.png", "00000.semantic.png", "00001.png", "00001.semantic.png", "grid.png", "request.json"}
    assert Image.open(tmp_path / "grid.png").size == (2 * 17 + 1, 10)
    assert "beside each picture" in (tmp_path / "request.json").read_text()


@torch.no_grad()
def test_a_map_of_twice_the_size_draws_twice_the_picture(files):
    """Convolutional sampling, as in the paper."""
    from ldm.backbone.unet import UNet
    from ldm.denoiser import Denoiser, LogRatio
    from ldm.drawing.generate import generate
    from ldm.guidance.none import Unguided
    from ldm.prediction import Flow
    from ldm.sampler.ddim import DDIM
    from ldm.schedule import Linear

    conditioner = Conditioner({"semantic": Semantic(Halves(), 3)})
    net = UNet(3, conditioner.widths, width=8, mult=(1,), res_blocks=1, depth=(0,), middle_depth=0, groups=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model = LatentModel(Halves(), conditioner, Denoiser(net, Linear(), Flow(), LogRatio())).eval()
    for size in (16, 32):
        ask, count = read_request({"ask": {"map": f"{files}/maps/a.png"}, "resolution": size}, model)
        drawn = generate(model, ask, DDIM(2), Unguided(), range(count), (size, size))
        assert drawn.shape == (1, 3, size, size) and drawn.isfinite().all()
