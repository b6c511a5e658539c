"""What `model=` takes beside our own: brought into our layout once, kept by hash, and drawn as its own pipeline draws it."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler, UniPCMultistepScheduler
from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError
from omegaconf import OmegaConf
from PIL import Image

import ldm
from helpers.family import their_pipeline, unconditional
from ldm.build import build, load_model
from ldm.command.cache import main as cache_command
from ldm.command.list import models
from ldm.command.usual import as_usual, drawn_as
from ldm.compose import compose_config
from ldm.drawing.generate import unit_noise
from ldm.errors import NotFound, Refusal, Unreachable
from ldm.files.content import file_content
from ldm.files.folder import load_tensors, save_tensors, write_json
from ldm.guidance.cfg import CFG
from ldm.guidance.none import Unguided
from ldm.interop import cache as brought_module
from ldm.interop import hub, published
from ldm.interop.bundle import Bundle
from ldm.interop.convert import read, write
from ldm.interop.usual import usual_of
from ldm.rest import at_rest, autoencoder_of, recipe_of
from ldm.sampler.euler import Euler


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Pipelines of Stable Diffusion 1 and XL by name, in folders of diffusers', and the first as a single file."""
    home = tmp_path_factory.mktemp("theirs")
    pipelines = {kind: their_pipeline(kind, home / f"words-{kind}") for kind in ("sd1", "xl")}
    pipelines["xl"].scheduler = EulerDiscreteScheduler.from_config(pipelines["xl"].scheduler.config, timestep_spacing="leading")
    for kind, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(home / kind)
    write(read(str(home / "sd1"))[0], home / "one.safetensors", "compvis")
    return home, pipelines


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory):
    """A cache of this file's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield brought_module.home()


SLOW = [pytest.param(kind, None, marks=pytest.mark.slow) for kind in ("sd1", "xl")]


@pytest.mark.parametrize("kind, steps", [("sd1", 3), *SLOW])
def test_unasked_it_draws_what_its_own_pipeline_draws_unasked(theirs, kind, steps):
    """Size, sampler, steps, grid and guidance are the pipeline's: not one is said on either side, but the noise."""
    (home, pipelines), size = theirs, 16
    model = ldm.load(home / kind, device="cpu")
    drawn = model.draw("a red fox", seed=5, steps=steps, output="pt")
    noise = unit_noise([5], (4, size // 2, size // 2))
    said = {} if steps is None else {"num_inference_steps": steps}
    said |= {"original_size": (size, size), "target_size": (size, size)} if kind == "xl" else {}
    wanted = pipelines[kind]("a red fox", latents=noise, output_type="pt", **said).images * 2 - 1
    assert drawn.shape == wanted.shape == (1, 3, size, size)
    torch.testing.assert_close(drawn, wanted, atol=2e-3, rtol=0)


def test_each_setting_that_is_said_takes_the_place_of_the_usual_one(theirs):
    model = ldm.load(theirs[0] / "sd1", device="cpu")
    usual = model.usual
    assert usual["resolution"] == [16, 16] and usual["guidance"]["scale"] == 7.5 and usual["sampler"]["steps"] == 50
    assert usual["sampler"]["grid"] == {"_target_": "ldm.sampler.grid.Leading", "last": 0.001}

    def of(*words):
        return as_usual(OmegaConf.to_container(compose_config("sample", ["model=x", *words])), usual)

    assert of()["sampler"] == usual["sampler"] == of("sampler=null", "sampler.steps=null", "sampler/grid=null")["sampler"]
    assert of("sampler.steps=3")["sampler"] == {**usual["sampler"], "steps": 3}
    heun = of("sampler=heun", "sampler/grid=karras")["sampler"]
    assert heun["_target_"].endswith("Heun") and heun["steps"] == 20 and heun["grid"]["rho"] == 7.0
    assert of("sampler=heun", "sampler.steps=null")["sampler"]["steps"] == 50
    assert of("sampler=heun")["sampler"]["grid"] == usual["sampler"]["grid"]
    assert of("guidance.scale=3")["guidance"] == {**usual["guidance"], "scale": 3}
    assert of("guidance=interval")["guidance"]["high"] == 5.8
    alone = as_usual({"sampler": None, "guidance": {"scale": 3}}, {"guidance": {"_target_": "ldm.guidance.none.Unguided"}})
    assert alone["guidance"]["_target_"].endswith("CFG") and alone["sampler"]["_target_"].endswith("DPMpp")
    assert of("sampler.grid.last=0.5")["sampler"]["grid"] == {**usual["sampler"]["grid"], "last": 0.5}
    assert of("sampler=heun", "sampler.grid.last=0.5")["sampler"]["grid"] == {**usual["sampler"]["grid"], "last": 0.5}


def test_only_what_is_taken_of_a_models_usual_is_checked():
    """A stranger's model may name anything; what the command chooses instead is not held against it."""
    usual = {"guidance": {"_target_": "os.system"}, "sampler": {"_target_": "os.system", "grid": {"_target_": "os.remove"}}}
    own = {"sampler": {"_target_": "ldm.sampler.heun.Heun", "grid": {"_target_": "ldm.sampler.grid.Uniform"}}, "guidance": None}
    with pytest.raises(Refusal, match=r"usual\.sampler\._target_=os\.remove"):
        as_usual(own, usual)
    usual["sampler"].pop("grid")
    with pytest.raises(Refusal, match=r"usual\.guidance\._target_=os\.system"):
        as_usual(own, usual)
    assert as_usual({**own, "guidance": {"_target_": "ldm.guidance.none.Unguided"}}, usual)["sampler"] == own["sampler"]


def test_a_training_keeps_how_its_previews_are_drawn():
    words = ["experiment=emoji/text", "guidance.scale=3", "sampler=heun", "sampler.steps=7"]
    drawn = drawn_as(compose_config("train", words))
    assert drawn["guidance"]["scale"] == 3 and drawn["sampler"]["steps"] == 7 and drawn["sampler"]["grid"]["shift"] == 1.0
    weak = drawn_as(compose_config("train", ["experiment=emoji/text", "guidance=autoguidance", "guidance.weak.path=x"]))
    assert weak.keys() == {"sampler"}


def test_it_is_brought_once_and_again_when_it_changes(theirs, monkeypatch, tmp_path):
    source = tmp_path / "mine.safetensors"
    source.write_bytes((theirs[0] / "one.safetensors").read_bytes())
    source.with_suffix(".yaml").write_bytes((theirs[0] / "one.yaml").read_bytes())
    folder = at_rest(source)
    assert folder.parent == brought_module.home() and recipe_of(folder)["usual"]["sampler"]["steps"] == 50
    monkeypatch.setattr(brought_module, "_convert", None)  # which would now be called in vain
    with monkeypatch.context() as again:
        again.setattr(brought_module, "file_content", None)  # nor is it hashed again
        assert at_rest(str(source)) == folder
    source.touch()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(source.read_bytes())
    copy.with_suffix(".yaml").write_bytes(source.with_suffix(".yaml").read_bytes())
    assert at_rest(source) == at_rest(copy) == folder, "known by what is in it"
    monkeypatch.undo()
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    source.write_bytes(data)
    assert at_rest(source) != folder


def test_half_of_it_is_never_taken(theirs, monkeypatch, tmp_path):
    """A conversion that is killed leaves nothing that is read; the next begins anew, and removes what was left."""
    source = tmp_path / "theirs"
    source.symlink_to(theirs[0] / "sd1")
    (brought_module.home()).mkdir(exist_ok=True)
    monkeypatch.setattr(brought_module, "CONVERSION", 10**6)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr("ldm.interop.layout.ours.save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            at_rest(source)
    assert not [note for _, note, _ in brought_module.entries() if note["conversion"] == 10**6]
    assert not list(brought_module.home().glob(".*.part"))
    assert (at_rest(source) / "model.safetensors").is_file()


def test_ours_are_themselves(theirs, tmp_path):
    ours = tmp_path / "ours"
    write(read(str(theirs[0] / "sd1"))[0], ours, "ldm")
    assert at_rest(ours) == at_rest(ours / "model.safetensors") == ours and autoencoder_of(ours) == ours / "autoencoder"
    assert autoencoder_of(theirs[0] / "sd1").name == "autoencoder"
    (tmp_path / "run").mkdir()
    assert at_rest(tmp_path / "run") == tmp_path / "run", "a run whose first checkpoint is to come"


def test_an_autoencoder_alone_is_brought_too(theirs):
    alone = ldm.load(theirs[0] / "sd1" / "vae", device="cpu")
    assert alone.model is None and alone.encode(Image.new("RGB", (16, 16))).shape == (1, 4, 8, 8)


def test_without_conditions_there_is_no_guidance(tmp_path):
    pipeline = unconditional(tmp_path)
    pipeline.save_pretrained(tmp_path / "it")
    model = ldm.load(tmp_path / "it", device="cpu")
    assert model.usual["guidance"]["_target_"].endswith("Unguided") and model.draw(steps=2)[0].size == (16, 16)


@pytest.mark.parametrize(
    "scheduler, sampler, grid",
    [
        (UniPCMultistepScheduler, "unipc.UniPC", {"_target_": "ldm.sampler.grid.Leading", "spare": 1}),
        (EulerAncestralDiscreteScheduler, "euler_ancestral.EulerAncestral", {"_target_": "ldm.sampler.grid.Leading"}),
        (EulerAncestralDiscreteScheduler, "euler_ancestral.EulerAncestral", {"_target_": "ldm.sampler.grid.Trailing"}),
        (LCMScheduler, "consistency.Consistency", {"_target_": "ldm.sampler.grid.Distilled"}),
    ],
)
def test_the_scheduler_says_the_sampler(theirs, tmp_path, scheduler, sampler, grid):
    """Turbo's too, whose spacing is trailing, and a latent consistency model's, in four steps without guidance."""
    spacing = "trailing" if "Trailing" in grid["_target_"] else "leading"
    told = scheduler.from_config(theirs[1]["sd1"].scheduler.config, timestep_spacing=spacing, steps_offset=1)
    for part in (theirs[0] / "sd1").iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").unlink()
    told.save_pretrained(tmp_path / "scheduler")
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"scheduler": ["diffusers", scheduler.__name__]}
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    usual = usual_of(read(str(tmp_path))[0], tmp_path)
    lcm = scheduler is LCMScheduler
    steps = {"steps": 4, "scaling": 10.0} if lcm else {"steps": 50}
    assert usual["sampler"] == {"_target_": f"ldm.sampler.{sampler}", **steps, "grid": grid}
    assert usual["guidance"]["scale"] == (1.0 if lcm else 7.5)


def test_half_precision_is_kept_and_drawn_in_on_a_gpu(theirs, tmp_path):
    from ldm.drawing.precision import precision_of

    theirs[1]["sd1"].unet.half().save_pretrained(tmp_path / "unet")
    theirs[1]["sd1"].unet.float()
    for part in (theirs[0] / "sd1").iterdir():
        if part.name != "unet":
            (tmp_path / part.name).symlink_to(part)
    folder = at_rest(tmp_path)
    usual = recipe_of(folder)["usual"]
    assert usual["precision"] == "16" and next(load_model(folder).denoiser.parameters()).dtype == torch.float32
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert precision_of(None, usual, gpu) == "16" and precision_of(None, usual, cpu) == "32" == precision_of(32, usual, gpu)
    with pytest.raises(Refusal, match="precision=8: wanted one of 32, bf16, 16"):
        precision_of(8, usual, gpu)
    model = ldm.load(folder, device="cpu")
    whole, rounded = (model.draw("a", steps=2, settings=[f"precision={p}"], output="pt") for p in ("32", "bf16"))
    assert rounded.dtype == torch.float32 and 0 < (whole - rounded).abs().mean() < 0.1
    matrix = model.model.denoiser.backbone.middle[0].conv_in.weight
    half = model.draw("a", steps=2, settings=["precision=16"], output="pt")
    assert matrix.dtype == torch.float16 and (whole - half).abs().mean() < 0.02, "kept as in the file"
    invert = {"init": ldm.api.to_pil(whole)[0], "settings": ["source=a", "sampler=ddim", "precision=16"], "strength": 1.0}
    assert len(model.draw("b", steps=2, **invert)) == 1 and matrix.dtype == torch.float16
    assert torch.equal(model.draw("a", steps=2, output="pt"), whole) and matrix.dtype == torch.float32


# ---- names, and the hub


def test_published_models_say_where_they_are_and_under_which_licence():
    rows = published.published()
    assert {"sd1.5", "sdxl"} <= rows.keys() and dict(models()).keys() == rows.keys()
    for row in rows.values():
        assert hub.repository(row.source)[0].count("/") == 1 and row.licence and isinstance(row.gated, bool)
        assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256)
        assert (row.sha256 is None) == (not hub.repository(row.source)[1]), "a file has a hash"


@pytest.fixture
def offered(monkeypatch, theirs, tmp_path):
    """A hub that has org/name, the pipeline of Stable Diffusion 1, and in it one.safetensors."""
    asked = []

    def snapshot(name, **only):
        asked.append(name)
        return str(theirs[0] / "sd1")

    def file(name, path, **only):
        asked.append(f"{name}/{path}")
        return str(theirs[0] / path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(list_repo_files=lambda name: ["model_index.json"]))
    return asked


def rows(monkeypatch, **given):
    table = {name: published.Published(licence="mit", gated=False, **row) for name, row in given.items()}
    for place in (published, brought_module):
        monkeypatch.setattr(place, "published", lambda: table)


def test_a_published_models_usual_is_part_of_what_its_cache_is_called(theirs):
    """Another way in which a short name is usually drawn is another entry, since the entry's recipe holds it."""
    path, row = theirs[0] / "one.safetensors", published.Published(source="hf://org/name", licence="mit", gated=False)
    other = dataclasses.replace(row, usual={"guidance": {"_target_": "ldm.guidance.none.Unguided"}})
    keys = [brought_module._key(path, "x", each, lambda line: None) for each in (row, row, other)]
    assert keys[0] == keys[1] != keys[2]


def test_the_hub_and_short_names_are_fetched_once(offered, theirs, monkeypatch, capsys):
    digest = file_content(theirs[0] / "one.safetensors")
    source, usual = "hf://org/name/one.safetensors", {"guidance": {"_target_": "ldm.guidance.none.Unguided"}}
    rows(monkeypatch, tiny={"source": source, "sha256": digest, "usual": usual}, broken={"source": source, "sha256": "0" * 64})
    first = at_rest("hf://org/name")
    assert at_rest("hf://org/name") == first == at_rest(theirs[0] / "sd1") and offered == ["org/name"]
    short = at_rest("tiny")
    assert at_rest("tiny") == short and offered[1:] == ["org/name/one.safetensors"]
    assert "licence: mit" in capsys.readouterr().out
    with pytest.raises(Refusal, match=r"one\.safetensors has sha256 .* and broken has 0000"):
        at_rest("broken")
    with pytest.raises(NotFound, match=r"no model in tinny: .* Did you mean `tiny`"):
        at_rest("tinny")


def test_what_is_not_had_says_how_to_bring_it(monkeypatch):
    response = SimpleNamespace(headers={}, request=None, status_code=403)

    def fails(error):
        def call(*_, local_files_only=False, **__):
            raise LocalEntryNotFoundError("not in the cache") if local_files_only else error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", call)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", call)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(list_repo_files=call))

    fails(HTTPError("no route"))
    with pytest.raises(Unreachable, match=r"no route\. Where there .*`hf download a/b --local-dir DIR`.*model=DIR\."):
        at_rest("hf://a/b")
    with pytest.raises(Unreachable, match=r"hf download a/b c\.safetensors .*model=DIR/c\.safetensors"):
        at_rest("hf://a/b/c.safetensors")
    fails(GatedRepoError("403", response=response))
    with pytest.raises(Unreachable, match=r"gated: consent to its licence at https://huggingface\.co/a/b, .*HF_TOKEN"):
        at_rest("hf://a/b")
    with pytest.raises(Refusal, match="hf://org/name"):
        at_rest("hf://b")


def test_a_mirror_is_tried_where_the_source_is_gone(offered, monkeypatch):
    rows(monkeypatch, moved={"source": "hf://gone/away", "mirror": "hf://org/name"})
    there = huggingface_hub.snapshot_download

    def gone(name, **only):
        if name.startswith("gone"):
            raise LocalEntryNotFoundError("gone")
        return there(name, **only)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    assert at_rest("moved").parent == brought_module.home()


def test_the_cache_is_listed_and_cleared(theirs, capsys):
    folder = at_rest(theirs[0] / "sd1")
    cache_command([])
    told = capsys.readouterr().out
    assert folder.name in told and str(theirs[0] / "sd1") in told and "models," in told
    with pytest.raises(SystemExit, match="There is no nothing"):
        cache_command(["clear", "nothing"])
    cache_command(["clear", str(theirs[0] / "sd1")])
    assert not folder.exists()
    cache_command(["clear"])
    assert not list(brought_module.entries())


def test_what_a_file_leaves_open_is_said_to_convert(tmp_path, theirs):
    weights = load_tensors(theirs[0] / "one.safetensors")
    left = {name: x for name, x in weights.items() if not name.startswith("first_stage_model.")}
    save_tensors(left, tmp_path / "part.safetensors")
    with pytest.raises(Refusal, match=r"--autoencoder FOLDER_OR_FILE\. .*`ldm convert \S+part\.safetensors FOLDER --to ldm"):
        at_rest(tmp_path / "part.safetensors")
    with pytest.raises(NotFound, match="no model in"):
        at_rest(Path("runs/nothing/at/all"))


@pytest.mark.parametrize(
    "pipeline, backbone, grid, wanted, scale",
    [
        (
            "StableDiffusion3Pipeline",
            {"_target_": "ldm.backbone.mmdit.MMDiT"},
            "shifted sampler.grid.shift=3.0",
            (28, "Shifted"),
            7.0,
        ),
        ("FluxPipeline", {"_target_": "ldm.backbone.flux.Flux", "guided": True}, "by_size", (28, "BySize"), None),
        ("FluxPipeline", {"_target_": "ldm.backbone.flux.Flux", "guided": False}, "uniform", (4, "Uniform"), None),
    ],
)
def test_models_of_straight_paths_are_drawn_by_eulers_method(tmp_path, pipeline, backbone, grid, wanted, scale):
    """From a folder, and from a single file, alike."""
    bundle = Bundle(
        {
            "backbone": backbone,
            "condition": {"text": {"_target_": "ldm.condition.text.Texts"}},
            "schedule": {"_target_": "ldm.schedule.Linear"},
        },
        grid=grid,
    )
    for place, told in {"scheduler/scheduler_config": "FlowMatchEulerDiscreteScheduler", "model_index": pipeline}.items():
        write_json({"_class_name": told}, tmp_path / f"{place}.json")
    folder, file = usual_of(bundle, tmp_path), usual_of(bundle, tmp_path / "one.safetensors")
    for usual in (folder, file):
        sampler, guidance = build(usual["sampler"]), build(usual["guidance"])
        assert (type(sampler), sampler.steps, type(sampler.grid).__name__) == (Euler, *wanted)
        assert guidance == (Unguided() if scale is None else CFG(scale))
    assert folder["sampler"]["steps"] == file["sampler"]["steps"] and file["resolution"] == [1024, 1024]
