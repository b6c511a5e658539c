"""Latents ahead of time: what they hold, what they are refused with, and that training on them is training on the pictures."""

import io
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from helpers.data import picture
from helpers.language import save_t5, their_t5
from ldm.autoencoder.kl import KL
from ldm.build import build, build_members, build_stage
from ldm.command.precompute import precompute
from ldm.compose import compose_config
from ldm.conditioner import Conditioner
from ldm.data.batch import latents
from ldm.data.batch.latents import check_provenance, write_latents
from ldm.data.shard.write import write_shards
from ldm.data.shards import Shards
from ldm.data.stream import Streamed
from ldm.data.usual import usual_of
from ldm.files.folder import save_model
from ldm.types import Draw


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return KL(channels=2, width=8, mult=(1, 2), res_blocks=1, groups=4).eval()


@pytest.fixture
def pictures(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (11, 3)).tolist()
    rows = ({"__key__": f"{i:03d}", "txt": f"{i}", "jpg": picture(colour=tuple(c))} for i, c in enumerate(colours))
    write_shards(rows, tmp_path / "pictures", per_shard=4)
    return Shards(tmp_path / "pictures", size=16, batch=4)


def latents_of(folder, val=None, **options):
    return Shards(folder, val, fields={"moments": "moments.npy", "caption": "txt"}, size=16, batch=4, **options)


@pytest.mark.parametrize("half", [False, True])
def test_latents_made_ahead_are_those_made_online(autoencoder, pictures, tmp_path, half):
    for rank in range(2):
        write_latents(autoencoder, pictures, "train", tmp_path / "out", 3, "cpu", 4, half, rank, 2)
    ahead = latents_of(tmp_path / "out")
    assert ahead.train_set.keys == pictures.train_set.keys and ahead.train_set.captions() == pictures.train_set.captions()
    online = pictures.on_after_batch_transfer(next(iter(pictures.ordered("train", 11))))
    stored = ahead.on_after_batch_transfer(next(iter(ahead.ordered("train", 11))))["moments"]
    with torch.no_grad():
        moments = autoencoder.encode(online["image"])
    tolerance = 2**-10 if half else 1e-5
    torch.testing.assert_close(stored, torch.cat((moments.mean, moments.std), 1), rtol=tolerance, atol=tolerance)


def test_an_interrupted_precomputation_goes_on(autoencoder, pictures, tmp_path, monkeypatch):
    wrote = []

    def cut(samples, path):
        wrote.append(path.name)
        if len(wrote) == 2:
            raise KeyboardInterrupt
        return write(samples, path)

    write = latents.write_shard
    monkeypatch.setattr(latents, "write_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / ".00001.tar.0a1b2c3d.part").touch()  # as kill -9 leaves it
        write_latents(autoencoder, pictures, "train", tmp_path / "out", 3, "cpu", 4)
    write_latents(autoencoder, pictures, "train", tmp_path / "out", 3, "cpu", 4)
    assert wrote == ["00000.tar", "00001.tar", "00001.tar", "00002.tar"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert latents_of(tmp_path / "out").train_set.keys == pictures.train_set.keys
    with pytest.raises(ValueError, match=r"other latents: size 16 there, 8 here.*out="):
        pictures.size = 8
        write_latents(autoencoder, pictures, "train", tmp_path / "out", 3, "cpu", 4)


class Stage:
    def __init__(self, autoencoder):
        self.model = type("Model", (), {"autoencoder": autoencoder, "conditioner": Conditioner({})})()

    def latent_model(self):
        return self.model


def test_latents_of_another_autoencoder_are_refused(autoencoder, pictures, tmp_path):
    write_latents(autoencoder, pictures, "train", tmp_path / "out", 3, "cpu", 4)
    check_provenance(latents_of(tmp_path / "out"), Stage(autoencoder))
    check_provenance(pictures, Stage(autoencoder))
    autoencoder.mean[0] += 1
    with pytest.raises(ValueError, match=r"made with another autoencoder.*autoencoder\.path.*precompute\.py"):
        check_provenance(latents_of(tmp_path / "out"), Stage(autoencoder))
    autoencoder.mean[0] -= 1
    for source in (f"{tmp_path}/out/*.tar", f"{tmp_path}/out/{{00000..00002}}.tar", [tmp_path / "out" / "00001.tar"]):
        check_provenance(latents_of(source), Stage(autoencoder))
        with pytest.raises(ValueError, match="made with another autoencoder"):
            check_provenance(latents_of(source), Stage(KL(channels=2, width=8, mult=(1, 2), res_blocks=1, groups=4)))
    with pytest.raises(ValueError, match="made with another autoencoder"):
        other = Stage(KL(channels=2, width=8, mult=(1, 2), res_blocks=1, groups=4))
        write_latents(other.model.autoencoder, pictures, "train", tmp_path / "val", 3, "cpu", 4)
        check_provenance(latents_of(tmp_path / "out", tmp_path / "val"), Stage(autoencoder))


def test_several_folders_of_latents_must_be_of_one_make(autoencoder, pictures, tmp_path):
    torch.manual_seed(1)
    other = KL(channels=2, width=8, mult=(1, 2), res_blocks=1, groups=4).eval()
    for name, net, half in (
        ("a", autoencoder, False),
        ("b", autoencoder, False),
        ("other", other, False),
        ("half", autoencoder, True),
    ):
        write_latents(net, pictures, "train", tmp_path / name, 3, "cpu", 4, half)
    check_provenance(latents_of([tmp_path / "a", tmp_path / "b"], weights=[3, 1]), Stage(autoencoder))
    for name, what in (
        ("other", r"another autoencoder \(sha256 \w+\) than this run's"),
        ("half", r"another precision \(float16\) than .*/a's"),
    ):
        with pytest.raises(ValueError, match=rf"The latents in .*/{name} were made with {what}"):
            check_provenance(latents_of([tmp_path / "a", tmp_path / name], weights=[3, 1]), Stage(autoencoder))
    (tmp_path / "b" / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"/b holds 2 of the 3 shards of latents .*The same command goes on"):
        check_provenance(latents_of([tmp_path / "a", tmp_path / "b"]), Stage(autoencoder))
    (tmp_path / "a" / "provenance.json").unlink()
    with pytest.warns(UserWarning, match=r"/a has no provenance\.json: what made the latents in it is not known"):
        check_provenance(latents_of(tmp_path / "a"), Stage(autoencoder))


def test_pictures_of_several_folders_that_share_their_keys(autoencoder, pictures, tmp_path):
    write_shards(({"__key__": f"{i:03d}", "txt": f"b{i}", "jpg": picture()} for i in range(5)), tmp_path / "b")
    both = Shards([tmp_path / "pictures", tmp_path / "b"], size=16, batch=4)
    write_latents(autoencoder, both, "train", tmp_path / "out", 4, "cpu", 100)
    ahead = latents_of(tmp_path / "out").train_set
    assert sorted(ahead.captions()) == sorted(both.train_set.captions()) and len(set(ahead.keys)) == 16
    assert {"000", "000-2", "010"} < set(ahead.keys)


# ---- moments and embeddings, by command, in training


KL_RECIPE = {"_target_": "ldm.autoencoder.kl.KL", "channels": 2, "width": 8, "mult": [1, 2], "res_blocks": 1, "groups": 4}
TEXT = ["condition.text.layers=[0,-1]", "condition.text.pooled=true", "condition.text.rate=0.5"]
CACHED = ["autoencoder=cached", "autoencoder.channels=2", "autoencoder.factor=2", "condition=[cached_text]"]
CACHED += ["condition.cached_text.rate=0.5"]
PARTS = {f"caption_{part}": f"text.{part}.npy" for part in ("tokens", "mask", "vector")}
BUCKETS = [[16, 16], [12, 24]]
UNET = ["backbone.width=8", "backbone.groups=4", "backbone.heads=2", "backbone.mult=[1]", "backbone.depth=[1]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, clip_folder):
    """An autoencoder, a CLIP, pictures of two shapes; their latents and embeddings, square as float16, in buckets as float32."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("ahead")
    (home / "quickstart").mkdir()
    (home / "quickstart" / "clip").symlink_to(clip_folder)
    net = KL(channels=2, width=8, mult=(1, 2), res_blocks=1, groups=4)
    save_model(net.state_dict() | {"count": torch.tensor(1)}, KL_RECIPE, home / "quickstart" / "autoencoder")
    jpegs = [picture(size=[(32, 16), (20, 20)][i % 2], colour=(20 * i, 99, 250 - 20 * i)) for i in range(12)]
    rows = ({"__key__": f"{i:03d}", "txt": f"{i} foxes", "jpg": jpeg} for i, jpeg in enumerate(jpegs))
    write_shards(rows, home / "pictures", per_shard=5)
    config = compose_config("precompute", [*shared(home), f"model={home}/quickstart/autoencoder", f"out={home}/square", *TEXT])
    config.half = True
    precompute(config)
    config.half, config.out, config.data.buckets = False, f"{home}/bucketed", BUCKETS
    precompute(config)
    return home


def shared(home):
    return ["data=shards", f"runs={home}", f"data.train={home}/pictures", "data.size=16", "data.workers=0", "condition=[text]"]


def test_latents_remember_what_their_pictures_are(home):
    pictures = OmegaConf.to_container(compose_config("train", shared(home)).data, resolve=True)
    latents = {"train": f"{home}/square/train", "fields": {"moments": "moments.npy", "caption": "txt"}, "size": 16}
    assert usual_of(latents) == usual_of(pictures), "so that evaluate.py finds the real ones"
    assert usual_of(latents)["data"]["train"] == f"{home}/pictures"
    assert usual_of(latents | {"train": f"{home}/elsewhere"})["data"]["fields"] == latents["fields"]


@pytest.fixture(scope="module")
def stages(home):
    """The same network told by pictures and captions, and by what was made of them ahead of time."""
    null = f"condition.cached_text.path={home}/square/text"
    options = ([*TEXT], [*CACHED, null])
    online, ahead = (build_stage(compose_config("train", [*shared(home), *UNET, *more])).train() for more in options)
    torch.manual_seed(0)
    for weight in online.model.denoiser.parameters():
        weight.data += 0.05 * torch.randn_like(weight)  # a network that listens: it begins with zeros
    ahead.model.denoiser.load_state_dict(online.model.denoiser.state_dict())
    return online, ahead


def stored(folder, **options):
    return Shards(folder, fields={"moments": "moments.npy", "caption": "txt", **PARTS}, **{"size": 16, "batch": 4} | options)


@pytest.mark.parametrize(("made", "buckets", "tolerance"), [("square", None, 2e-3), ("bucketed", BUCKETS, 1e-5)])
def test_losses_on_latents_and_embeddings_are_those_on_pictures_and_captions(home, stages, made, buckets, tolerance):
    """To the rounding of what is stored, the same captions dropped; and neither autoencoder nor text tower is kept."""
    data = Shards(home / "pictures", size=16, batch=4, buckets=buckets), stored(home / made / "train", buckets=buckets)
    check_provenance(data[1], stages[1])
    (keys, losses, told), ahead = (run(stage, one) for stage, one in zip(stages, data))
    assert (keys, told) == (ahead[0], ahead[2])
    torch.testing.assert_close(ahead[1], losses, rtol=tolerance, atol=tolerance)
    assert not stages[1].model.autoencoder.kept and not stages[1].model.conditioner.embedders["cached_text"].kept
    dropped = Draw(0, torch.arange(4), 4).uniform("drop/text") < 0.5
    assert dropped.any() and not dropped.all()


def run(stage, data):
    """-> keys, losses, and the sizes that are told, of every sample once, bucket by bucket."""
    keys, losses, told = [], [], []
    for batch in data.bucketed("train", 4):
        batch = data.on_after_batch_transfer(batch)
        losses.append(stage.losses(batch, Draw(0, batch["position"], 4))["loss"].detach())
        keys.append(batch["key"])
        told.append({n: v.tolist() for n, v in batch.items() if n.split("_")[0] in ("original", "crop", "target")})
    return keys, torch.stack(losses), told


def test_latents_of_other_weights_or_sizes_are_refused_before_the_first_step(home, stages, tmp_path):
    with pytest.raises(ValueError, match=r"made with another size \(16\) than this run's \(32\).*data\.size"):
        check_provenance(stored(home / "square" / "train", size=32), stages[1])
    with pytest.raises(ValueError, match=r"made with another buckets .*data\.buckets"):
        check_provenance(stored(home / "bucketed" / "train"), stages[1])
    told = json.loads((home / "square" / "train" / "provenance.json").read_text())
    other = [*CACHED, f"condition.cached_text.path={home}/square/text", "condition.cached_text.load.layers=[-1,0]"]
    with pytest.raises(ValueError, match=r"condition\.cached_text\.load makes another text"):
        check_provenance(stored(home / "square" / "train"), build_stage(compose_config("train", [*shared(home), *UNET, *other])))
    with pytest.raises(ValueError, match=r"names no pictures"):
        stored(home / "square" / "train", flip=0.5)
    (tmp_path / "00000.tar").symlink_to(home / "square" / "train" / "00000.tar")
    for what, line in (("text", r"condition\.cached_text\.load"), ("autoencoder", r"autoencoder\.path")):
        (tmp_path / "provenance.json").write_text(json.dumps(told | {what: "0" * 64}))
        with pytest.raises(ValueError, match=rf"another {what} \(sha256 0+\).*{line}"):
            check_provenance(stored(tmp_path), stages[1])
    stream = Streamed(tmp_path, fields=stored(tmp_path).fields, size=16, batch=4)
    stream.trainer = SimpleNamespace(lightning_module=stages[1])
    with pytest.raises(ValueError, match="another autoencoder"):
        stream.setup()


def test_embeddings_of_other_settings_do_not_mix_with_those_that_are_there(home):
    options = [*shared(home), f"model={home}/quickstart/autoencoder", f"out={home}/square", *TEXT, "half=true"]
    precompute(compose_config("precompute", options))
    with pytest.raises(
        ValueError, match=r"other latents: text_settings .*'layers': \[0, -1\].* there, .*'layers': \[-1\].* here"
    ):
        precompute(compose_config("precompute", [*options, "condition.text.layers=[-1]"]))


def test_a_stand_in_of_other_sizes_is_refused_before_the_first_step(home):
    for size, line in (("factor=4", "autoencoder.channels=2 autoencoder.factor=4"), ("channels=3", "autoencoder.channels=3")):
        options = [*shared(home)[:-1], *UNET, *CACHED[:3], "condition=[]", f"autoencoder.{size}"]
        with pytest.raises(ValueError, match=f"{line}.*has 2 and 2; say these"):
            check_provenance(stored(home / "square" / "train"), build_stage(compose_config("train", options)))


def test_embeddings_are_kept_of_texts_only(home):
    options = [*shared(home)[:-1], f"model={home}/quickstart/autoencoder", f"out={home}/x", "condition=[label]"]
    with pytest.raises(ValueError, match=r"condition=\[label\]: embeddings are kept of text conditions"):
        precompute(compose_config("precompute", options))


def test_two_texts_are_kept_together(home, capsys):
    """A CLIP and a T5 whose padding is masked: what they say beside each other, read as the printed words say.

    They were kept in batches of other sizes, whose matrix products some CPUs round otherwise: equal to 1e-5 of numbers near 1.
    """
    save_t5(home / "t5", their_t5(32))
    clip, t5 = f"local-dir:{home}/quickstart/clip", f"{home}/t5"
    texts = ["condition=[text,t5]", f"condition.text.model={clip}", "condition.text.layers=[0,-1]", "condition.text.pooled=true"]
    texts += ["condition.text.padding=0", f"condition.t5.model={t5}", "condition.t5.length=9"]
    precompute(
        compose_config("precompute", [*shared(home)[:-1], f"model={home}/quickstart/autoencoder", f"out={home}/two", *texts])
    )
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    config = compose_config("train", [*words, f"runs={home}", "objective.time.mean=0"])
    data, stage = build(config.data), build_stage(config).eval()
    data.setup()
    batch = data.on_after_batch_transfer(next(iter(data.ordered("train", 4))), 0)
    assert batch["caption_tokens"].shape[1] < 12 + 9, "as many as the longest of them says"
    cached, beside = (
        stage.model.conditioner,
        Conditioner(build_members(compose_config("precompute", ["model=m", *texts]), "condition")),
    )
    draw = Draw(0, batch["position"], 4)
    for told in (cached(batch, draw), cached({"caption": batch["caption"]})):
        wanted = beside({"caption": batch["caption"]})
        dropped = draw.uniform("drop/together") < 0.1
        assert told.tokens.shape == wanted.tokens.shape == (4, 12 + 9, 32)
        for part in ("tokens", "mask", "vector"):
            torch.testing.assert_close(getattr(told, part)[~dropped], getattr(wanted, part)[~dropped], rtol=1e-5, atol=1e-5)


def test_further_fields_go_along(home, tmp_path, capsys):
    """A control picture cut as its picture was, a label map and every text of a mixture are what they were beside pictures."""
    sample = {"jpg": picture(size=(32, 16), colour=(9, 200, 30)), "txt": "a fox", "long.txt": "a red fox, in snow"}
    stripes = np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (16, 1, 3))
    sample |= {"edges.jpg": encoded(stripes, "PNG"), "map.png": encoded(stripes[..., 0] // 8, "PNG")}
    write_shards(({"__key__": f"{i:03d}", **sample} for i in range(4)), tmp_path / "pictures")
    fields = ["data.fields.caption={txt:0.5,long.txt:0.5}", "+data.fields.edges=edges.jpg", "+data.fields.map=map.png"]
    words = ["data=shards", f"data.train={tmp_path}/pictures", "data.size=16", f"model={home}/quickstart/autoencoder", *fields]
    config = compose_config("precompute", [*words, f"out={tmp_path}/out", "keep=[edges,map,caption]", "data.workers=0"])
    precompute(config)
    said = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert {"data.fields.caption={txt:0.5,long.txt:0.5}", "+data.fields.edges=edges.png", "+data.fields.map=map.png"} <= set(said)
    told = {"caption": {"txt": 0.5, "long.txt": 0.5}, "map": "map.png"}
    online = Shards(tmp_path / "pictures", fields={"image": "jpg", **told, "edges": "edges.jpg"}, size=16, batch=4)
    ahead = Shards(tmp_path / "out" / "train", fields={"moments": "moments.npy", **told, "edges": "edges.png"}, size=16, batch=4)
    net = build({"_target_": "ldm.build.load_autoencoder", "path": f"{home}/quickstart/autoencoder"})
    check_provenance(ahead, Stage(net))
    first, other = (data.on_after_batch_transfer(next(iter(data.ordered("train", 4)))) for data in (online, ahead))
    assert torch.equal(first["edges"], other["edges"]) and torch.equal(first["map"], other["map"])
    assert first["caption"] == other["caption"] and "image" not in other
    with pytest.raises(ValueError, match="made with another autoencoder"):
        check_provenance(ahead, Stage(KL(channels=2, width=8, mult=(1, 2), res_blocks=1, groups=4)))
    with pytest.raises(ValueError, match="the pictures beside latents would be cut otherwise"):
        Shards(tmp_path, fields={"moments": "moments.npy", "edges": "edges.png"}, flip=0.5)
    out = (net, online, "train", tmp_path / "out" / "train", 4, "cpu")
    with pytest.raises(ValueError, match=r"keep=\[depth\]: data\.fields names image, caption.*add \+data\.fields\.depth=MEMBER"):
        write_latents(*out, keep=["depth"])
    with pytest.raises(ValueError, match="embeddings are of one caption"):
        write_latents(*out, text=(object(), None))
    with pytest.raises(ValueError, match=r"other latents: keep .*edges"):
        write_latents(*out)


def encoded(pixels, form):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()
