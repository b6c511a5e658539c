"""What a model is told: joining, dropping, and the text tower against open_clip's own encoder."""

import pytest
import torch
from torch import nn

from ldm.backbone.unet import UNet
from ldm.condition.conditioner import Conditioner
from ldm.condition.label import Label
from ldm.condition.text import Text, whitening
from ldm.folder import save_tensors
from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.types import Cond, Draw, Widths

NAMES = ["red apple", "fox", "cat face with tears of joy"]


@pytest.fixture
def text(clip_folder):
    return Text(f"local-dir:{clip_folder}", pooled=True)


def no(count):
    return torch.zeros(count, dtype=torch.bool)


def test_last_layer_and_pooled_vector_are_open_clips(text, clip_folder):
    import open_clip

    clip = open_clip.create_model(f"local-dir:{clip_folder}").eval()
    ids = text.tokenizer(NAMES)
    cond = text(NAMES, no(3))
    torch.testing.assert_close(cond.vector, clip.encode_text(ids))
    end = cond.tokens[torch.arange(3), ids.argmax(1)] @ clip.text_projection
    torch.testing.assert_close(end, clip.encode_text(ids))
    assert cond.mask.sum(1).tolist() == [(i > 0).sum().item() for i in ids]


def test_a_dropped_caption_is_the_empty_prompt(text):
    told = text(NAMES, torch.tensor([False, True, False]))
    empty = text(["", "", ""], no(3))
    torch.testing.assert_close(told.vector[1], empty.vector[1])
    assert not torch.allclose(told.vector[0], empty.vector[0])


def test_padding_does_not_matter(text):
    net = UNet(4, text.widths, width=16, mult=(1,), res_blocks=1, depth=(1,), heads=2, groups=4)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    cond = text(NAMES, no(3))
    noisy = Cond(cond.vector, torch.where(cond.mask[..., None], cond.tokens, 100.0), cond.mask)
    x, level = torch.randn(3, 4, 4, 4), torch.rand(3)
    torch.testing.assert_close(net(x, level, cond), net(x, level, noisy))
    other = Cond(cond.vector, cond.tokens.flip(0), cond.mask)
    assert not torch.allclose(net(x, level, cond), net(x, level, other), atol=1e-3)


def test_layers_join_by_width_and_whiten(clip_folder, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (folder / name).write_bytes((clip_folder / name).read_bytes())
    plain = Text(f"local-dir:{folder}", layers=[0, -1], pooled=True)
    cond = plain(NAMES, no(3))
    rows, width = cond.tokens[cond.mask], plain.widths.tokens // 2
    stats = {"pooled": cond.vector, "layer.0": rows[:, :width], "layer.1": rows[:, :width], "layer.2": rows[:, width:]}
    table = {f"{k}.mean": v.mean(0) for k, v in stats.items()}
    table |= {f"{k}.covariance": torch.cov(v.T) for k, v in stats.items()}
    save_tensors(table, folder / "statistics.safetensors")
    told = Text(f"local-dir:{folder}", layers=[0, -1], pooled=True, whiten=True)(NAMES, no(3))
    for x in (told.tokens[told.mask], told.vector):
        torch.testing.assert_close(x.mean(0), torch.zeros(x.shape[1]), atol=1e-3, rtol=0)
    mean, covariance = torch.randn(5), torch.cov(torch.randn(5, 50))
    _, mix = whitening(mean, covariance, ridge=0.0)
    torch.testing.assert_close(mix @ covariance @ mix, torch.eye(5), atol=1e-4, rtol=0)


def test_missing_tower_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python train\.py experiment=emoji/clip (runs=\S+ )?run_id=.*condition\.text"):
        Text(f"local-dir:{tmp_path}/none")


def test_missing_statistics_name_the_setting(clip_folder, tmp_path):
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"condition\.text\.whiten=false"):
        Text(f"local-dir:{tmp_path}", whiten=True)


def test_a_layer_that_is_not_there_is_named(text):
    text.layers = (7,)
    with pytest.raises(ValueError, match=r"condition\.text\.layers=\[7\].*0 to 2"):
        text(NAMES, no(3))


def test_dropping_depends_on_position_alone():
    conditioner = Conditioner({"label": Label(10, 8, rate=0.5)})
    labels, position = torch.arange(8), torch.arange(8) + 100
    whole = conditioner({"label": labels}, Draw(0, position, 8)).tokens
    halves = [conditioner({"label": labels[r]}, Draw(0, position[r], 8)).tokens for r in (slice(0, 4), slice(4, 8))]
    assert torch.equal(whole, torch.cat(halves))


def test_dropping_follows_its_rate():
    draw = Draw(3, torch.arange(4000), 4000)
    conditioner = Conditioner({"label": Label(2, 4, rate=0.25)})
    tokens = conditioner({"label": torch.zeros(4000, dtype=torch.int64)}, draw).tokens[:, 0]
    share = (tokens == conditioner.embedders["label"].table.weight[2]).all(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)


def test_rate_zero_is_never_dropped_not_in_the_null_either():
    conditioner = Conditioner({"a": Label(4, 8, key="a", rate=0.0), "b": Label(4, 8, key="b", rate=0.5)})
    batch = {"a": torch.tensor([1]), "b": torch.tensor([1])}
    null, told = conditioner(batch, only=()), conditioner(batch)
    assert torch.equal(null.tokens[:, 0], told.tokens[:, 0])
    assert not torch.equal(null.tokens[:, 1], told.tokens[:, 1])
    assert torch.equal(conditioner(batch, only=("b",)).tokens, told.tokens)


def test_null_forgets_and_order_is_kept():
    conditioner = Conditioner({"label": Label(10, 8)})
    a, b = ({"label": torch.tensor([i, i + 1])} for i in (0, 5))
    assert torch.equal(conditioner(a, only=()).tokens, conditioner(b, only=()).tokens)
    assert not torch.equal(conditioner(a).tokens, conditioner(b).tokens)


def test_what_is_missing_is_named():
    conditioner = Conditioner({"label": Label(10, 8)})
    with pytest.raises(ValueError, match=r"'label' reads the field 'label'.*only \['image'\]"):
        conditioner({"image": torch.zeros(1)})
    with pytest.raises(ValueError, match="not \\['txet'\\]"):
        conditioner({"label": torch.zeros(1)}, only=("txet",))
    with pytest.raises(ValueError, match="this model knows 0 to 9"):
        conditioner({"label": torch.tensor([10])})


def test_conditions_join():
    a = Cond(vector=torch.ones(2, 4), tokens=torch.ones(2, 3, 4), spatial=torch.ones(2, 1, 5, 5))
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    b = Cond(vector=torch.zeros(2, 6), tokens=torch.zeros(2, 5, 4), mask=hidden, spatial=torch.ones(2, 2, 5, 5))
    both = a + b
    assert both.vector.shape == (2, 10) and both.tokens.shape == (2, 8, 4) and both.spatial.shape == (2, 3, 5, 5)
    assert both.mask.tolist() == [[True] * 3 + [False] * 5] * 2
    assert (Cond() + b).mask is b.mask
    assert a.stack(a).tokens.shape == (4, 3, 4)
    assert (Widths(1, 8, 2) + Widths(3, 8, 4)) == Widths(4, 8, 6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="widths, 8 and 16"):
        Widths(tokens=8) + Widths(tokens=16)
    with pytest.raises(ValueError, match="cannot share a batch"):
        Cond(vector=torch.ones(1, 2)).stack(Cond())


class Told:
    """A model whose denoiser multiplies by what it is told, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def denoiser(self, x_t, t, cond):
        self.calls += 1
        return x_t * cond.vector[:, :1, None, None]

    def tell(self, ask, only=None):
        value = 5.0 if only == () else ask["caption"][0]
        return Cond(vector=torch.full((3, 4), value))


X, T = torch.randn(3, 1, 2, 2), torch.tensor(0.5)


def test_guidance_at_one_is_no_guidance_to_the_bit():
    model = Told()
    denoise = CFG(1.0)(model, {"caption": [2.0]})
    assert torch.equal(denoise(X, T), Unguided()(model, {"caption": [2.0]})(X, T))
    assert model.calls == 2


@pytest.mark.parametrize("scale, factor", [(0.0, 5.0), (2.0, -1.0), (3.0, -4.0)])
def test_guidance_is_linear_in_its_scale(scale, factor):
    torch.testing.assert_close(CFG(scale)(Told(), {"caption": [2.0]})(X, T), factor * X)


def test_a_negative_prompt_takes_the_nulls_place():
    ask = {"caption": [2.0], "negative.caption": [3.0]}
    torch.testing.assert_close(CFG(3.0)(Told(), ask)(X, T), (3.0 + 3 * (2.0 - 3.0)) * X)
