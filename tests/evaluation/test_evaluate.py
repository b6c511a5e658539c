"""Evaluation as a whole: exact over processes, kept, compared, swept, and on what other programs drew."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.command import called
from helpers.processes import together
from ldm.build import build
from ldm.command.evaluate import evaluate, main, sweep
from ldm.command.subject import Subject, spread
from ldm.command.train import train
from ldm.compose import compose_config
from ldm.conditioner import Conditioner
from ldm.data.emoji import Emoji
from ldm.data.usual import size_of
from ldm.errors import Refusal
from ldm.evaluation import rows as rows_module
from ldm.evaluation.pictures import Given, Split, another, chosen, unconditional
from ldm.evaluation.real import Archive, Folder
from ldm.evaluation.rows import see
from ldm.evaluation.run import measure
from ldm.extractor.clip import Clip
from ldm.files.folder import save_model
from ldm.metric._pairs import Pairs
from ldm.metric.frechet import Frechet, moments
from ldm.metric.kernel import Kernel
from ldm.report.page import read_curves

UNET = ["backbone.width=16", "backbone.groups=4", "backbone.heads=2", "condition=[label]", "condition.label.width=8"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, clip_folder, emoji_root):
    """runs/quickstart/{clip,autoencoder,diffusion}, untrained: what a picture looks like does not matter here."""
    torch.manual_seed(0)
    runs = tmp_path_factory.mktemp("runs")
    (runs / "quickstart").mkdir()
    (runs / "quickstart" / "clip").symlink_to(clip_folder)
    recipe = {"_target_": "ldm.autoencoder.kl.KL", "width": 8, "mult": [1, 1, 1], "groups": 4}
    save_model(build(recipe).state_dict() | {"count": torch.tensor(1)}, recipe, runs / "quickstart" / "autoencoder")
    recipe = json.loads(json.dumps(plain(compose_config("train", [*UNET, "backbone=unet", f"runs={runs}"]).training.model)))
    model = build(recipe)
    for parameter in model.denoiser.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model({k: v for k, v in model.state_dict().items() if "autoencoder" not in k}, recipe, runs / "quickstart" / "diffusion")
    return runs


def plain(node):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True)


@pytest.fixture
def command(home, emoji_root, tmp_path):
    """The overrides of an evaluation of that model, into a folder of its own."""
    data = [f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0.2", "+data.fields.label=cls"]
    where = [f"model={home}/quickstart/diffusion", f"out={tmp_path}/out", f"cache={tmp_path}/cache", f"runs={home}"]
    return [*data, *where, "sampler.steps=2", "count=11", "batch=4", "metric=[frechet_clip,nearest,reconstruction]"]


def run(*overrides):
    return evaluate(compose_config("evaluate", overrides))


# ---- exact and parallel


@pytest.fixture
def one_thread():
    """As each of several processes has: sums of float32 in another order differ in the seventh digit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_draw_the_same_pictures_and_find_the_same_numbers(command, one_thread, tmp_path, monkeypatch):
    """As `srun -n 2 python evaluate.py` starts them: SLURM says who they are, and nobody where they meet."""
    numbers, pictures, _ = run(*command)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost"}
    apart = [c.replace(f"{tmp_path}/out", f"{tmp_path}/two").replace(f"{tmp_path}/cache", f"{tmp_path}/cache2") for c in command]
    ranks = [job | {"SLURM_PROCID": str(rank)} for rank in range(2)]
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    codes, said = together(lambda: called(main, *apart), ranks, tmp_path)
    assert codes == [0, 0] and "fd_clip" in said[0] and not said[1]
    told = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert {name: entry["value"] for name, entry in told.items()} == pytest.approx(numbers, rel=1e-6)
    drawn = [sorted((tmp_path / out).glob("drawing-*/*.png")) for out in ("out", "two")]
    assert len(drawn[0]) == 11 and [f.read_bytes() for f in drawn[0]] == [f.read_bytes() for f in drawn[1]]
    assert len(pictures["drawing"]) == 11 and numbers["fd_clip"] > 0


class Numbers:
    """Pictures that say their own number; batches are noted."""

    def __init__(self, count):
        self.count, self.protocol, self.asked = count, {"numbers": count}, []

    def fields(self, numbers):
        return {"number": torch.tensor(list(numbers))}

    def images(self, numbers, fields):
        self.asked.append(list(numbers))
        return fields["number"].float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def look(images, batch):
    return {"brightness": images.mean((1, 2, 3))}


@pytest.mark.parametrize("count, world", [(11, 1), (11, 2), (11, 4), (3, 4), (8, 2)])
def test_every_picture_once_in_full_batches_whatever_the_processes(count, world, tmp_path, monkeypatch):
    batches = []
    for rank in range(world):
        monkeypatch.setattr(rows_module, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(rows_module, "world", lambda: world)
        source = Numbers(count)
        stores = see(source, {"look": look}, tmp_path, 4, "judging")
        batches += source.asked
    assert all(len(batch) == 4 for batch in batches)
    assert sorted(n for batch in batches for n in set(batch)) == list(range(count))
    rows = stores["look"].rows()
    assert rows["number"].tolist() == rows["brightness"].tolist() == list(range(count))


def test_what_was_interrupted_goes_on_and_what_was_seen_is_not_drawn_again(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "SECONDS", -1)  # write every batch at once

    class Cut(Numbers):
        def images(self, numbers, fields):
            if 8 in numbers:
                raise KeyboardInterrupt
            return super().images(numbers, fields)

    with pytest.raises(KeyboardInterrupt):
        see(Cut(11), {"look": look}, tmp_path, 4, "judging")
    source = Numbers(11)
    stores = see(source, {"look": look}, tmp_path, 4, "judging")
    assert source.asked == [[8, 9, 10, 10]] and stores["look"].rows()["brightness"].tolist() == list(range(11))
    again = Numbers(11)
    see(again, {"look": look, "more": look}, tmp_path, 4, "judging")
    assert len(again.asked) == 3  # the new look sees all of them, the old one none
    assert see(Numbers(11), {"look": look, "more": look}, tmp_path, 4, "judging")["more"].done() == set(range(11))


def test_a_second_metric_reads_the_pictures_that_were_kept(command, tmp_path, monkeypatch):
    run(*command)
    monkeypatch.setattr("ldm.evaluation.pictures.generate", lambda *_: pytest.fail("drawn again"))
    numbers, _, _ = run(*command[:-1], "metric=[class_accuracy]")
    assert set(numbers) == {"class_accuracy", "class_accuracy_real"}
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        run(*command, "seed=1")


def test_a_number_does_not_depend_on_which_pictures_share_its_batch(command, tmp_path):
    one, _, _ = run(*command)
    other, _, _ = run(*command, "batch=5", f"out={tmp_path}/other")
    assert other["reconstruction_psnr"] == pytest.approx(one["reconstruction_psnr"], rel=1e-6)
    assert other["nearest_similarity"] == pytest.approx(one["nearest_similarity"], rel=1e-3)


# ---- requests, and whose they are


def test_shuffled_requests_are_all_there_and_none_is_its_own():
    for count in (2, 7, 50):
        others = [another(n, count, 3) for n in range(count)]
        assert sorted(others) == list(range(count)) and all(a != n for n, a in enumerate(others))


def test_right_shuffled_and_no_conditions_are_drawn_and_judged_by_the_own_request(command, tmp_path):
    pictures, metrics = {}, {}
    for kind in ("right", "shuffled", "none"):
        arguments = [*command[:-1], "metric=[class_accuracy]", "requests=val", "count=6", f"conditioning={kind}"]
        _, found, judges = run(*arguments, f"out={tmp_path}/{kind}", "guidance=none")
        pictures[kind], metrics[kind] = found["drawing"], judges["class_accuracy"]
    assert not torch.equal(pictures["right"], pictures["none"])
    told = json.loads((tmp_path / "none" / "metrics.json").read_text())["class_accuracy"]
    assert (
        told["protocol"]["conditioning"] == "none"
        and told["protocol"]["requests"]["split"] == "val"
        and told["error"] is not None
    )
    with pytest.raises(ValueError, match="wanted right, shuffled or none"):
        run(*command, "conditioning=wrong")


def test_untold_guidance_hears_the_null_condition_alone():
    """Of all conditions, or of some, whose negative they do not hear either."""
    text, label = (SimpleNamespace(key=key) for key in ("caption", "label"))
    conditioner = SimpleNamespace(embedders={"text": text, "label": label}, fields_of=Conditioner.fields_of)

    class Model:
        denoiser = "denoiser"

        def __init__(self):
            self.conditioner = conditioner

        def condition(self, ask, only=None):
            return sorted(ask), only

    def heard(conditions):
        said = []

        def guidance(model, ask):
            said.extend([model.condition(ask), model.condition(ask, only=("text",))])

        unconditional(guidance, conditions)(Model(), {"caption": 1, "negative.caption": 2, "label": 3})
        return said

    assert heard(["text", "label"]) == [(["caption", "label"], ())] * 2
    assert heard(["text"]) == [(["caption", "label"], ("label",)), (["caption", "label"], ())]
    assert heard(["label"]) == [(["caption", "label", "negative.caption"], ("text",))] * 2


def test_maps_that_are_asked_for_stand_in_the_protocol_by_their_hash():
    maps = torch.zeros(2, 64, 64, dtype=torch.int64)
    asked = [Given({"map": m, "label": torch.arange(2), "caption": ["a", "b"]}, 2).protocol["asked"] for m in (maps, maps + 1)]
    assert [len(a.pop("map")) for a in asked] == [64, 64] and asked[0] == {"label": [0, 1], "caption": ["a", "b"]}
    assert Given({"map": maps}, 2).protocol != Given({"map": maps + 1}, 2).protocol


def test_evenly_chosen_samples_reach_from_the_first_to_the_last(data):
    total = len(data.train_set)
    assert chosen(data, 3) == [0, round((total - 1) / 2), total - 1] and chosen(data, total) == list(range(total))
    with pytest.raises(ValueError, match="use count="):
        chosen(data, 5000, "val")


# ---- pictures that other programs made


@pytest.fixture
def folders(tmp_path, data):
    """A folder of 9 drawings with captions, and one of 12 real pictures."""
    for name, numbers in {"drawn": range(9), "real": range(3, 15)}.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(data.rows("train", numbers)["image"]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03d}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(f"picture {i}" for i in range(9)) + "\n")
    return tmp_path


def judge(home, folders, *more):
    where = [f"images={folders}/drawn", f"reference={folders}/real", f"runs={home}", "batch=4"]
    return run(*where, "metric=[frechet_clip]", *more)


def test_folders_archives_and_shards_hold_the_same_pictures(home, folders, data):
    from ldm.data.shard.write import write_shards

    folder, _, _ = judge(home, folders)
    files = sorted((folders / "real").glob("*.png"))
    np.savez(folders / "real.npz", np.stack([np.array(Image.open(f)) for f in files]))
    write_shards(({"__key__": f.stem, "jpg": f.read_bytes()} for f in files), folders / "shards")
    archive, _, _ = judge(home, folders, f"reference={folders}/real.npz")
    shards, _, _ = judge(home, folders, f"reference={folders}/shards", "resolution=32")
    assert folder["fd_clip"] == pytest.approx(archive["fd_clip"], rel=1e-6) == pytest.approx(shards["fd_clip"], rel=1e-6)
    same, _, _ = judge(home, folders, f"reference={folders}/drawn")
    assert same["fd_clip"] == pytest.approx(0, abs=1e-3)
    told = json.loads((folders / "drawn-evaluation" / "metrics.json").read_text())["fd_clip"]
    assert told["protocol"]["reference"]["count"] == 9 and told["subject"]["images"] == f"{folders}/drawn" and "note" in told


def test_captions_belong_to_pictures_line_by_line(home, folders):
    scores, _, metrics = judge(home, folders, f"prompts={folders}/prompts.txt", "metric=[clip_score]")
    assert len(metrics["clip_score"].scores) == 9 and scores["clip_score"] >= 0
    (folders / "prompts.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"fewer captions than pictures: prompts has 2 lines.*9 pictures"):
        judge(home, folders, f"prompts={folders}/prompts.txt", "metric=[clip_score]")
    (folders / "prompts.txt").write_text("one\n\nthree\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        judge(home, folders, f"prompts={folders}/prompts.txt", "metric=[clip_score]")


def test_pictures_of_a_folder_stand_in_natural_order_and_what_is_left_out_is_said(tmp_path, capsys):
    for i, ending in enumerate(("png", "bmp", "tif", "jpg") * 3):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"{i}.{ending}")
    (tmp_path / "._0.png").write_bytes(b"of macOS")
    for name in ("film.gif", "words.txt", "more.txt"):
        (tmp_path / name).touch()
    for size in (None, 8):
        fields = Folder(str(tmp_path), size, "cpu", captions=[str(i) for i in range(12)]).fields(range(12))
        assert (fields["image"][:, 0, 4, 4].add(1).mul(127.5) - 20 * torch.arange(12)).abs().max() < 3 and not fields[
            "corrupt"
        ].any()
        assert fields["caption"] == [str(i) for i in range(12)]
    assert "3 files are left out" in (said := capsys.readouterr().out) and "2 .txt, 1 .gif" in said


def test_corrupt_pictures_are_counted_and_refused_beyond_a_limit(home, folders):
    whole, _, _ = judge(home, folders)
    (folders / "real" / "999.png").write_bytes((folders / "real" / "000.png").read_bytes()[:200])
    with pytest.raises(
        ValueError, match=r"1 of 13 pictures in reference=\S+ cannot be read, such as \S+999\.png.*corrupt=\.\.\."
    ):
        judge(home, folders)
    passed, _, _ = judge(home, folders, "corrupt=0.1")
    assert passed["fd_clip"] == pytest.approx(whole["fd_clip"], rel=1e-5)
    assert json.loads((folders / "drawn-evaluation" / "metrics.json").read_text())["fd_clip"]["corrupt"] == {"reference": 1}


def test_pictures_of_mixed_size_are_refused_or_brought_to_one(home, folders):
    Image.open(folders / "real" / "000.png").resize((40, 30)).save(folders / "real" / "500.png")
    with pytest.raises(ValueError, match=r"mixed sizes.*30x40.*resolution=256"):
        judge(home, folders)
    assert judge(home, folders, "resolution=24")[0]["fd_clip"] > 0


def test_statistics_alone_do_for_inception_alone(home, folders):
    np.savez(folders / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match="holds statistics alone"):
        judge(home, folders, f"reference={folders}/statistics.npz")
    np.savez(folders / "odd.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['other'\]; wanted arr_0"):
        judge(home, folders, f"reference={folders}/odd.npz")
    (folders / "torn.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"no whole \.npz"):
        judge(home, folders, f"reference={folders}/torn.npz")
    np.savez(folders / "few.npz", arr_0=np.zeros((3, 8, 8), np.uint8))
    (folders / "few.npz").rename(folders / "FEW.NPZ")
    with pytest.raises(ValueError, match=r"FEW\.NPZ: arr_0 is uint8 of shape \(3, 8, 8\)"):
        judge(home, folders, f"reference={folders}/FEW.NPZ")


class Colours:
    """An extractor that takes itself for Inception: the means of the three channels."""

    statistics = "inception"  # as if those in .npz files were of it

    def __init__(self):
        self.protocol = {"extractor": "inception of three", "sha256": "0", "resize": "none"}

    def __call__(self, images):
        return {"features": images.mean((2, 3))}


def test_given_statistics_stand_for_the_pictures_and_are_asked_first(folders):
    real = Folder(str(folders / "real"), None, "cpu", option="reference")
    mean, covariance = moments(Colours()(real.fields(range(12))["image"])).values()
    np.savez(folders / "statistics.npz", mu=mean.numpy(), sigma=covariance.numpy())
    given = {"reference": lambda: Archive(str(folders / "statistics.npz"), "cpu")}
    drawn = {"drawing": lambda: Folder(str(folders / "drawn"), None, "cpu")}
    fid = {"frechet": Frechet(Colours)}
    numbers, lost = measure(fid, drawn, given, folders / "rows", folders / "cache", 4)
    plain, _ = measure(fid, drawn, {"reference": lambda: real}, folders / "rows", folders / "cache", 4)
    assert numbers["frechet"]["fid"].value == pytest.approx(plain["frechet"]["fid"].value, rel=1e-6) and not lost
    with pytest.raises(ValueError, match="holds statistics alone"):
        measure({**fid, "kernel": Kernel(Colours)}, {"drawing": lambda: Numbers(9)}, given, folders / "new", folders, 4)
    assert not (folders / "new").exists()
    np.savez(folders / "statistics.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="3 wide, the reference's 5: its statistics are of another extractor"):
        measure(fid, drawn, given, folders / "rows", folders / "cache", 4)


def test_what_is_missing_is_said(home, folders):
    with pytest.raises(ValueError, match="model=RUN_OR_FOLDER must be said, or images=FOLDER"):
        run("metric=[frechet_clip]", f"runs={home}")
    (folders / "empty").mkdir()
    (folders / "list.csv").write_text("image,caption\n000.png,a\n")
    for words, said in (
        ("images={}/nowhere", "wanted a folder of pictures"),
        ("images={}/real/000.png", "wanted a folder of pictures"),
        ("images={}/empty", "there are no pictures"),
        ("reference={}/nowhere", r"nothing is there\. Wanted train, val, a folder of pictures, an \.npz"),
        ("reference={}/real/000.png", r"no file of pictures that is read\. Wanted"),
        ("prompts={}/list.csv", "is a table; wanted a text file"),
    ):
        with pytest.raises(Refusal, match=said):
            judge(home, folders, words.format(folders))
    with pytest.raises(ValueError, match="Reconstruction is measured with a model"):
        judge(home, folders, "metric=[reconstruction]")


def test_an_autoencoder_alone_is_measured(command, home, tmp_path):
    numbers, _, _ = run(*command[:-1], "metric=[reconstruction]", f"model={home}/quickstart/autoencoder")
    assert set(numbers) == {"reconstruction_psnr", "reconstruction_ssim"}


# ---- comparing, sweeping


def test_only_numbers_of_one_protocol_compare(command, tmp_path):
    from ldm.evaluation.compare import compare

    for name, more in {"a": [], "b": ["batch=5"], "c": ["sampler.steps=3"], "d": ["metric=[class_accuracy]"]}.items():
        run(*command, "metric=[nearest]", *more, f"out={tmp_path}/{name}")
    header, rows = compare([f"{tmp_path}/a", f"{tmp_path}/b/metrics.json"])
    assert header[1:] == [f"{tmp_path}/a", f"{tmp_path}/b/metrics.json"] and rows[0][0] == "nearest_similarity"
    assert "±" in rows[0][1] and "±" in rows[0][2]
    with pytest.raises(ValueError, match=r"authenticity: sampler\.steps is 2 in \S+ and 3 in"):
        compare([f"{tmp_path}/a", f"{tmp_path}/c"])
    with pytest.raises(ValueError, match="no number in common"):
        compare([f"{tmp_path}/a", f"{tmp_path}/d"])
    with pytest.raises(FileNotFoundError, match=r"no metrics\.json"):
        compare([f"{tmp_path}/a", f"{tmp_path}/nowhere"])
    (tmp_path / "bare.json").write_text('{"fid": 3.0}')
    with pytest.raises(ValueError, match="without their protocol"):
        compare([f"{tmp_path}/a", f"{tmp_path}/bare.json"])


def test_another_model_compares_and_says_that_it_is_another(command, home, tmp_path):
    from ldm.evaluation.compare import compare
    from ldm.files.folder import load_tensors, save_tensors

    shutil.copytree(home / "quickstart" / "diffusion", tmp_path / "model")
    weights = load_tensors(tmp_path / "model" / "model.safetensors")
    save_tensors({name: value * 1.01 for name, value in weights.items()}, tmp_path / "model" / "model.safetensors")
    run(*command, "metric=[nearest]", f"out={tmp_path}/a")
    run(*command, "metric=[nearest]", f"out={tmp_path}/b", f"model={tmp_path}/model")
    compare([f"{tmp_path}/a", f"{tmp_path}/b"])
    hashes = [json.loads((tmp_path / x / "metrics.json").read_text())["authenticity"]["subject"]["sha256"] for x in "ab"]
    assert hashes[0] != hashes[1]


def test_every_number_carries_its_protocol(command, tmp_path):
    run(*command, "precision=bf16")
    for name, entry in json.loads((tmp_path / "out" / "metrics.json").read_text()).items():
        protocol = entry["protocol"]
        assert {"extractor", "of", "count", "reference", "ema", "code"} <= protocol.keys()
        if protocol["of"] == "drawing":
            assert {"sampler", "guidance", "seed", "size", "precision", "conditioning", "requests"} <= protocol.keys()
            assert protocol["precision"] == "bf16, the network alone" and len(protocol["sha256"]) == 64 and protocol["resize"]
        assert isinstance(entry["value"], float), name


def test_sweeps_are_every_combination():
    from ldm.report.sweep import name_of, settings

    found = settings("guidance.scale=1,7.5 sampler=ddim,dpmpp metric=[a,b]")
    assert found[1] == ["guidance.scale=1", "sampler=dpmpp", "metric=[a,b]"] and len(found) == 4
    assert name_of(["guidance.scale=7.5", "model=runs/x/checkpoints/step-00000100.ckpt"]) == "scale-7.5_model-step-00000100"
    for wrong in ("", "sampler", "sampler=", "sampler=a,,b"):
        with pytest.raises(ValueError, match="sweep"):
            settings(wrong)


def test_the_settings_that_none_beats():
    from ldm.report.sweep import Setting, pareto

    points = [(10, 30), (8, 25), (12, 30), (8, 20), (20, 31)]
    found = [Setting([], {"fid": {"value": fid}, "clip_score": {"value": clip}}) for fid, clip in points]
    assert pareto(found, "fid", "clip_score") == {0, 1, 4} and pareto(found, None, "clip_score") == set()


def test_a_sweep_draws_each_setting_once_and_reports_all(command, tmp_path, capsys, monkeypatch):
    words = "sampler=ddim guidance.scale=1,2"
    page = sweep([*command, "metric=[frechet_clip,class_accuracy]", "logger=[tensorboard]"], words)
    text = page.read_text(encoding="utf-8")
    header, *rows, _ = capsys.readouterr().out.splitlines()[-4:]
    assert header.split() == ["guidance.scale", "fd_clip", "class_accuracy", "class_accuracy_real"]
    assert [row[0] for row in rows] == ["1", "2"]
    assert page == tmp_path / "out" / "report.html" and "http" not in text.replace("http://www.w3.org", "")
    assert (
        "Quality against agreement with the request" in text
        and "fd_clip over guidance.scale" in text
        and text.count("<h3>guidance.scale") == 2
    )
    told = json.loads((tmp_path / "out" / "sampler-ddim_scale-2" / "metrics.json").read_text())["fd_clip"]["protocol"]
    assert told["sampler"]["_target_"].endswith("DDIM") and told["sampler"]["steps"] == 2 and told["guidance"]["scale"] == 2
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))
    monkeypatch.setattr("ldm.evaluation.pictures.generate", lambda *_: pytest.fail("drawn again"))
    assert sweep([*command, "metric=[frechet_clip,class_accuracy]"], "sampler=ddim guidance.scale=2") == page


# ---- standard sets, on miniature copies


def test_coco_in_miniature(home, folders):
    shutil.copytree(folders / "real", folders / "coco" / "val2014")
    (folders / "coco" / "captions.txt").write_text("".join(f"a picture of {i}\n" for i in range(9)))
    coco = ["set=coco_30k", f"root={folders}/coco", f"images={folders}/drawn", "resolution=32", f"runs={home}"]
    numbers, _, _ = run(*coco, "metric=[frechet_clip,clip_score]")
    told = json.loads((folders / "drawn-evaluation" / "metrics.json").read_text())
    assert numbers["fd_clip"] > 0 and told["fd_clip"]["protocol"]["reference"]["count"] == 12


def test_imagenet_in_miniature(command, folders):
    """Labels 0 to 999 in turn, against an .npz with pictures and statistics."""
    files = sorted((folders / "real").glob("*.png"))
    pictures = np.stack([np.array(Image.open(f)) for f in files])
    np.savez(folders / "VIRTUAL_imagenet32_labeled.npz", arr_0=pictures, mu=np.zeros(2048), sigma=np.eye(2048))
    sets = ["set=imagenet", f"root={folders}", "resolution=32", "ask.label=0..2", "count=6", "metric=[frechet_clip]"]
    numbers, pictures, _ = run(*command[4:-1], *sets)
    assert numbers["fd_clip"] > 0 and len(pictures["drawing"]) == 6
    config = compose_config("evaluate", ["set=imagenet", f"root={folders}"])
    assert spread(plain(config)["ask"])["label"] == list(range(1000)) and config.count == 50000


@pytest.mark.parametrize("name", ["ffhq", "celeba_hq", "lsun"])
def test_unconditional_sets_in_miniature(name, home, folders):
    numbers, _, _ = run(
        f"set={name}", f"root={folders}/real", f"images={folders}/drawn", "resolution=32", f"runs={home}", "metric=[frechet_clip]"
    )
    assert numbers["fd_clip"] > 0


# ---- during training


def test_training_is_the_same_with_and_without_measuring_and_keeps_the_best(home, emoji_root, tmp_path, monkeypatch):
    emoji = [f"data.root={emoji_root}", "data.groups=[Activities]", "data.val_fraction=0.2", "+data.fields.label=cls"]
    small = [*UNET, "backbone=unet", "data.batch=8", "trainer.max_steps=4", "trainer.log_every_n_steps=1", "logger=[csv]"]
    common = [*emoji, *small, f"runs={home}", "name=watched", "sampler.steps=1"]
    values = iter([5.0, 7.0])
    monkeypatch.setattr("ldm.metric.frechet.frechet", lambda *_: next(values))
    watch = [
        "callback=[ema,evaluate]",
        "metric@callback.evaluate.metric=[frechet_clip,reconstruction]",
        "callback.evaluate.every=2",
    ]
    more = ["callback.evaluate.count=5", "callback.evaluate.batch=4", "callback.evaluate.best=fd_clip"]
    watched = train(compose_config("train", [*common, *watch, *more, "run_id=watched"]))
    alone = train(compose_config("train", [*common, "callback=[ema]", "run_id=alone"]))
    one, other = (torch.load(next(run.rglob("step-00000004.ckpt")), weights_only=True)["state_dict"] for run in (watched, alone))
    assert all(torch.equal(one[name], other[name]) for name in one)
    told = json.loads((watched / "evaluation" / "00000004" / "metrics.json").read_text())
    assert told["fd_clip"]["value"] == 7 and told["fd_clip"]["subject"]["step"] == 4 and "reconstruction_psnr" in told
    assert torch.load(watched / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 2
    assert "evaluate/fd_clip" in read_curves(watched)


def test_what_was_seen_of_some_pictures_does_not_serve_for_others(emoji_root):
    """Filters choose among the pictures, so they are part of what cached rows are kept under."""
    kept = [
        Split(Emoji(root=emoji_root, groups=["Activities"], val_fraction=0.2, filters=rules), "train", "cpu").protocol
        for rules in (None, {"caption_length": [None, 6]})
    ]
    assert kept[0] != kept[1]


def test_a_card_says_what_was_measured(command, home, tmp_path):
    """Evaluated beside the model, converted, and read on the card: the number, its error, how it was made."""
    from ldm.interop.convert import read, write

    shutil.copytree(home / "quickstart" / "diffusion", tmp_path / "model")
    numbers, _, _ = run(*command, "metric=[nearest]", f"model={tmp_path}/model", "out=null")
    bundle, _ = read(str(tmp_path / "model"))
    write(bundle, tmp_path / "converted", "ldm", source=str(tmp_path / "model"))
    page = (tmp_path / "converted" / "README.md").read_text()
    for name, value in numbers.items():
        assert f"- **{name}: {value:.4g}" in page
    assert " ± " in page and "count: 11" in page and "of: drawing" in page and "Nothing was measured" not in page
    (tmp_path / "model" / "evaluation" / "metrics.json").write_text('{"fid": 3.0}')
    write(bundle, tmp_path / "converted", "ldm", source=str(tmp_path / "model"))
    assert "cannot be read: " in (tmp_path / "converted" / "README.md").read_text()


# ---- what is asked wrong, or for nothing


def test_what_is_said_and_read_by_nobody_is_named(folders, command, tmp_path, capsys):
    """Of drawings that are judged as they are; and of a model, where metrics look at reconstructions alone."""
    words = [f"images={folders}/drawn", "count=2", "seed=5", f"prompts={folders}/prompts.txt", "sampler=heun", "data.size=8"]
    subject = Subject(plain(compose_config("evaluate", words)), tmp_path)
    subject.make({"clip_score": SimpleNamespace(of="drawing", against=None)})
    assert subject.pictures["drawing"]().count == 9
    said = "Not used, since images=... are judged as they are: count=2, seed=5, sampler, data\n"
    assert capsys.readouterr().out == said
    subject = Subject(plain(compose_config("evaluate", [*command, "seed=5", "reference=val"])), tmp_path)
    subject.make({"reconstruction": SimpleNamespace(of="reconstruction", against=None)})
    assert capsys.readouterr().out.endswith(
        "Not used, since metric=[reconstruction] reads nothing of it: reference=val, count=11, seed=5, sampler\n"
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("count=0", "count=0: wanted 1 or more"),
        ("batch=0", "batch=0: wanted 1 or more"),
        ("data.fields.image=txt", "data.fields has none as `image`: {'image': 'txt'"),
    ],
)
def test_a_wrong_number_or_field_is_named(command, wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        run(*command, wrong)


def test_sizes_that_are_none_are_refused():
    assert size_of(None, {"resolution": [8, 16]}) == ((8, 16), []) and size_of([8, 16], {})[0] == (8, 16)
    for wrong in (0, -8, [8, 8, 8], [8, 0], [8]):
        with pytest.raises(ValueError, match=r"resolution=.*wanted pixels"):
            size_of(wrong, {"resolution": [8, 8]})


def test_how_a_clip_is_shown_pictures_is_part_of_the_protocol(clip_folder, tmp_path):
    """Another mean changes what it says of every picture, and no weight."""
    other = shutil.copytree(clip_folder, tmp_path / "clip")
    about = json.loads((other / "open_clip_config.json").read_text())
    about["preprocess_cfg"]["mean"] = [0.4] * 3
    (other / "open_clip_config.json").write_text(json.dumps(about))
    for judge in (lambda folder: Pairs(f"local-dir:{folder}", None, "x"), lambda folder: Clip(f"local-dir:{folder}")):
        one, two = (judge(folder).protocol for folder in (clip_folder, other))
        assert one["sha256"] == two["sha256"] and two["preprocess"]["mean"] == [0.4] * 3 != one["preprocess"]["mean"]
        assert json.loads(json.dumps(two)) == two
