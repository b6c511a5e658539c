"""Fine-tuning from weights, `model.init`, of every stage; what is no such model is refused by name; the hub by the same code."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file

from helpers.family import their_pipeline
from ldm.autoencoder.kl import KL
from ldm.backbone.unet import UNet
from ldm.build import build_stage
from ldm.compose import compose_config
from ldm.files.folder import load_tensors, save_model, save_tensors, write_json
from ldm.interop.__main__ import main
from ldm.interop.begin import begin, weights_for
from ldm.interop.convert import read, write
from ldm.interop.find import network_of
from ldm.interop.hub import _wanted
from ldm.types import Widths

SMALL = ["experiment=emoji/autoencoder", "autoencoder.width=8", "autoencoder.groups=4", "autoencoder.mult=[1,1]"]
SMALL_CLIP = ["clip.vision_cfg.width=32", "clip.vision_cfg.layers=1", "clip.text_cfg.width=16", "clip.text_cfg.layers=1"]
RECIPE = {"_target_": "ldm.autoencoder.kl.KL", "width": 8, "mult": [1, 1], "res_blocks": 1, "groups": 4}


def settings(recipe):
    return {k: v for k, v in recipe.items() if k[0] != "_"}


def test_an_autoencoder_begins_from_another(tmp_path, clip_folder, capsys):
    weights = KL(**settings(RECIPE)).state_dict()
    save_model(weights, RECIPE, tmp_path / "before")
    ours = [*SMALL, f"loss.model=local-dir:{clip_folder}", f"model.init={tmp_path}/before"]
    stage = build_stage(compose_config("train", ours))
    assert f"{len(weights)} tensors taken, 0 grown, 0 new, 0 left" in capsys.readouterr().out
    assert all(torch.equal(stage.autoencoder.state_dict()[n], x) for n, x in weights.items())
    with pytest.raises(ValueError, match=r"is another network: decoder.*\(16, .* there, \(8, "):
        save_model(KL(**settings(RECIPE) | {"width": 16}).state_dict(), RECIPE | {"width": 16}, tmp_path / "wide")
        build_stage(compose_config("train", [*ours[:-1], f"model.init={tmp_path}/wide"]))


def test_a_clip_begins_from_another(tmp_path, capsys):
    ours = ["experiment=emoji/clip", *SMALL_CLIP]
    weights = {n: x + 1 for n, x in build_stage(compose_config("train", ours)).clip.state_dict().items()}
    save_tensors(weights, tmp_path / "open_clip_model.safetensors")
    stage = build_stage(compose_config("train", [*ours, f"model.init={tmp_path}"]))
    assert "0 grown, 0 new, 0 left" in capsys.readouterr().out
    assert all(torch.equal(stage.clip.state_dict()[n], x) for n, x in weights.items())
    with pytest.raises(FileNotFoundError, match=r"there is no open_clip_model\.safetensors"):
        weights_for("clip", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_run_that_is_not_finished_gives_its_averages(named, tmp_path, clip_folder, capsys):
    ours = [*SMALL, f"loss.model=local-dir:{clip_folder}"]
    stage = build_stage(compose_config("train", ours))
    state = {f"autoencoder.{n}": x for n, x in stage.autoencoder.state_dict().items()}
    averages = {n: x + 1 for n, x in state.items() if x.is_floating_point()}
    path = tmp_path / "run" / "checkpoints" / "step-00000002.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": state, "global_step": 2, "recipe": RECIPE, "callbacks": {"EMA": {"average": averages}}}, path)
    begun = build_stage(compose_config("train", [*ours, f"model.init={path if named == 'file' else tmp_path / 'run'}"]))
    assert "0 new, 0 left" in capsys.readouterr().out
    assert all(torch.equal(begun.state_dict()[n], x) for n, x in averages.items())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of pipelines, and single files, of Stable Diffusion 1, 2 and XL."""
    home = tmp_path_factory.mktemp("family")
    for kind in ("sd1", "sd2", "xl"):
        their_pipeline(kind, home / "words" / kind).save_pretrained(home / kind)
        write(read(str(home / kind))[0], home / f"{kind}.safetensors", "compvis")
    return home


def test_what_the_weights_do_not_say_the_config_does(folders):
    """Stable Diffusion 2's two kinds look alike: a conversion must be told, a training says it itself."""
    (folders / "bare.safetensors").write_bytes((folders / "sd2.safetensors").read_bytes())
    with pytest.raises(ValueError, match="Say --prediction noise or --prediction velocity"):
        read(str(folders / "bare.safetensors"))
    assert read(str(folders / "bare.safetensors"), "Velocity")[0].recipe["prediction"]["_target_"].endswith("Velocity")
    assert weights_for("model", str(folders / "bare.safetensors"), "Velocity")


def test_another_network_and_a_part_alone_are_refused(folders, tmp_path):
    bundle = read(str(folders / "sd1"))[0]
    net = torch.nn.Module()
    net.denoiser = torch.nn.Module()
    net.denoiser.backbone = UNet(4, Widths(tokens=64), **network_of(bundle).settings(bundle))
    assert "0 grown, 0 new, 0 left" in begin(net, weights_for("model", str(folders / "sd1")), "sd1")
    with pytest.raises(ValueError, match=r"model.init=xl is another network: denoiser\.backbone\..* there, .* here"):
        begin(net, weights_for("model", str(folders / "xl")), "xl")
    write(read(str(folders / "sd1" / "vae"))[0], tmp_path / "vae", "ldm")
    with pytest.raises(ValueError, match="is an autoencoder alone"):
        weights_for("model", str(tmp_path / "vae"))


def test_weights_split_over_files(folders):
    """As diffusers and transformers split large models: an index beside the parts; a lost part is named."""
    whole, place = read(str(folders / "sd1"))[0], folders / "sd1" / "unet"
    file = place / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    names = sorted(weights)
    parts = {"a-00001-of-00002.safetensors": names[:9], "a-00002-of-00002.safetensors": names[9:]}
    for part, held in parts.items():
        save_tensors({n: weights[n] for n in held}, place / part)
    index = {"metadata": {}, "weight_map": {n: part for part, held in parts.items() for n in held}}
    write_json(index, place / f"{file.name}.index.json")
    file.rename(place / "aside")
    again = read(str(folders / "sd1"))[0]
    assert all(torch.equal(again.weights[n], x) for n, x in whole.weights.items())
    (place / "a-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"a-00002-of-00002\.safetensors: there is no such file"):
        read(str(folders / "sd1"))
    (place / "aside").rename(file)
    (place / f"{file.name}.index.json").unlink()


def test_half_precision_that_is_not_finite_is_named_in_folders_too(folders, tmp_path):
    shutil.copytree(folders / "sd1", tmp_path / "broken")
    path = tmp_path / "broken" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {n: x.half() for n, x in load_tensors(path).items()}
    weights["decoder.conv_in.bias"][0] = float("inf")
    save_tensors(weights, path)
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.bias \(float16\) holds numbers that are not finite"):
        read(str(tmp_path / "broken"))


# ---- the hub


FILES = ["model_index.json", "v1-5.safetensors", "README.md", "run.py", "unet/config.json", "tokenizer/merges.txt"]
FILES += [f"unet/diffusion_pytorch_model.{kind}" for kind in ("safetensors", "fp16.safetensors", "bin", "non_ema.safetensors")]


def test_from_the_hub_each_part_once_and_no_code():
    assert _wanted(FILES) == [
        "model_index.json",
        "unet/config.json",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert "unet/diffusion_pytorch_model.bin" in _wanted([f for f in FILES if not f.endswith(".safetensors")])


def test_hub_and_push_by_the_command(folders, tmp_path, monkeypatch, capsys):
    """A repository is read as a local folder is; nothing is uploaded unless it is said."""
    asked, sent = [], []

    def snapshot(name, **only):
        asked.append((name, only))
        return str(folders / "sd1")

    api = SimpleNamespace(
        list_repo_files=lambda name: FILES,
        create_repo=lambda name, exist_ok: f"https://huggingface.co/{name}",
        upload_folder=lambda **what: sent.append(what),
        upload_file=lambda **what: sent.append(what),
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["", *map(str, words)])
        main()
        return capsys.readouterr().out

    told = run("hf://org/name", tmp_path / "ours", "--to", "ldm", "--licence", "mit")
    assert asked == [("org/name", {"allow_patterns": _wanted(FILES)})] and not sent and "on the hub" not in told
    assert "license: mit" in (tmp_path / "ours" / "README.md").read_text()
    assert "https://huggingface.co/me/mine" in run(
        tmp_path / "ours", tmp_path / "theirs", "--to", "diffusers", "--push", "me/mine"
    )
    assert sent == [{"repo_id": "me/mine", "folder_path": tmp_path / "theirs"}]
    run(tmp_path / "ours", tmp_path / "one.safetensors", "--to", "compvis", "--push", "me/mine")
    assert [what["path_in_repo"] for what in sent[1:]] == ["one.safetensors", "one.yaml"]
    with pytest.raises(SystemExit, match="name a repository of the Hugging Face hub as hf://org/name"):
        run("hf://name", tmp_path / "no", "--to", "ldm")

    def offline(*_, **__):
        raise HTTPError("no route")

    api.list_repo_files = api.create_repo = offline
    run("hf://org/name", tmp_path / "again", "--to", "ldm")
    assert asked[-1] == ("org/name", {"local_files_only": True})
    with pytest.raises(SystemExit, match=r"--push me/mine: no route\. The model is in .*/again"):
        run("hf://org/name", tmp_path / "again", "--to", "ldm", "--push", "me/mine")
    with pytest.raises(SystemExit, match="--push mine: name a repository as ORG/NAME"):
        run("hf://org/name", tmp_path / "never", "--to", "ldm", "--push", "mine")
    assert not (tmp_path / "never").exists()

    def not_there(*_, **__):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_there)
    with pytest.raises(SystemExit, match="hf://org/name was not fetched before, and is not had now: no route"):
        run("hf://org/name", tmp_path / "never", "--to", "ldm")


def test_zero_terminal_snr_is_drawn_from_the_last_step(folders, tmp_path):
    """2305.08891: `rescale_betas_zero_snr` and `timestep_spacing` go together, and travel both ways."""
    bundle = read(str(folders / "sd2"))[0]
    assert bundle.grid == "leading"
    bundle.recipe["schedule"]["zero_terminal_snr"] = True
    write(bundle, tmp_path / "out", "diffusers")
    told = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (told["rescale_betas_zero_snr"], told["timestep_spacing"]) == (True, "trailing")
    again = read(str(tmp_path / "out"))[0]
    assert again.grid == "trailing" and again.recipe["schedule"] == bundle.recipe["schedule"]
    with pytest.raises(ValueError, match="without zero_terminal_snr"):
        write(bundle, tmp_path / "one.safetensors", "compvis")
    write_json(told | {"beta_schedule": "squaredcos_cap_v2"}, tmp_path / "out" / "scheduler" / "scheduler_config.json")
    with pytest.raises(ValueError, match="beta_schedule=squaredcos_cap_v2; scaled_linear, linear are known"):
        read(str(tmp_path / "out"))
