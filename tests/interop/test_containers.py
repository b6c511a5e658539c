"""Names, containers and marks of the ecosystem: what means the same is read as the same, and what a file says is heard."""

import os
import shutil

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from helpers.family import their_pipeline, their_unet, unconditional
from ldm.build import load_autoencoder
from ldm.errors import Refusal
from ldm.files.folder import load_tensors, save_tensors
from ldm.interop.__main__ import main
from ldm.interop.convert import read, write
from ldm.interop.layout.single_file import read_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("keys")
    for kind in ("sd1", "xl"):
        their_pipeline(kind, home / "words" / kind).save_pretrained(home / kind)
    return home


@pytest.fixture(scope="module")
def files(folders):
    """Both models in single files without a yaml."""
    for kind in ("sd1", "xl"):
        write(read(str(folders / kind))[0], folders / f"{kind}.safetensors", "compvis")
        (folders / f"{kind}.yaml").unlink()
    return folders


def same(a, b):
    parts = [(a.weights, b.weights), *((a.parts[p].weights, b.parts[p].weights) for p in a.parts)]
    return a.parts.keys() == b.parts.keys() and all(
        x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in parts
    )


def test_what_a_file_does_not_say_is_printed(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", str(files / "sd1.safetensors"), str(tmp_path / "out"), "--to", "ldm"])
    main()
    said = capsys.readouterr().out
    words = ("scale: 0.18215", "heads: 32 wide", "hidden layer: -1", "prediction: noise", "schedule: ScaledLinear, betas 0.00085")
    for word in (*words, "steps: leading"):
        assert f"assumed      {word.split(': ')[0]}" in said and word in said, word


def test_marks_of_velocity_and_of_zero_terminal_snr(files, tmp_path):
    weights, none = load_tensors(files / "xl.safetensors"), torch.tensor([])
    save_tensors(weights | {"v_pred": none, "ztsnr": none}, tmp_path / "v.safetensors")
    recipe = read(str(tmp_path / "v.safetensors"))[0].recipe
    assert recipe["prediction"]["_target_"] == "ldm.prediction.Velocity" and recipe["schedule"]["zero_terminal_snr"]
    with pytest.raises(ValueError, match="leave --prediction noise out"):
        read(str(tmp_path / "v.safetensors"), "Noise")
    save_tensors(weights | {"ztsnr": none}, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        read(str(tmp_path / "z.safetensors"))


def test_older_names_and_shapes_are_the_same_model(files, tmp_path):
    """A text tower without its prefix, a bias of (C, 1, 1), and numbers of numpy's beside the weights."""
    import numpy as np

    weights = load_tensors(files / "sd1.safetensors")
    old = {n.replace("transformer.text_model.", "transformer."): x for n, x in weights.items()}
    old = {n: x[:, None, None] if n.startswith("first_stage_model.") and n.endswith("q.bias") else x for n, x in old.items()}
    assert sum(x.ndim == 3 for x in old.values()) == 2
    beside = {"loss": np.float64(0.5), "step": np.int64(7), "best": np.float32(1)}
    torch.save({"state_dict": old, "callbacks": beside, "global_step": np.int32(3)}, tmp_path / "old.ckpt")
    assert same(read(str(tmp_path / "old.ckpt"))[0], read(str(files / "sd1.safetensors"))[0])


def test_a_trimmed_tower_is_read_at_its_end(monkeypatch):
    from ldm.interop.part import _clip_file as compvis_text
    from ldm.interop.part._towers import tower_shapes

    text = {"context_length": 16, "vocab_size": 60, "width": 64, "heads": 1, "layers": 3, "proj_type": "none"}
    config = {"embed_dim": 64, "quick_gelu": False, "text_cfg": text}
    weights = {f"cond_stage_model.model.{n}": torch.zeros(s) for n, s in tower_shapes(config).items()}

    def layers(full, told=None):
        monkeypatch.setattr(compvis_text, "FULL", {64: full})
        return compvis_text.read_texts(weights, told)[0]["text"]["layers"]

    assert [layers(3), layers(4), layers(4, -2), layers(3, -1), layers(9)] == [[-2], [-1], [-1], [-1], [-2]]


@pytest.mark.parametrize("kind, ending", [("fp16", "safetensors"), ("bf16", "bin"), ("non_ema", "safetensors")])
def test_variants_as_diffusers_writes_them(folders, tmp_path, kind, ending):
    from diffusers import UNet2DConditionModel

    plain = read(str(folders / "sd1"))[0]
    shutil.copytree(folders / "sd1", tmp_path / "a", copy_function=os.link)
    net = UNet2DConditionModel.from_pretrained(folders / "sd1" / "unet")
    shutil.rmtree(tmp_path / "a" / "unet")
    split = {"max_shard_size": "1MB"} if kind == "fp16" else {}
    net.save_pretrained(tmp_path / "a" / "unet", variant=kind, safe_serialization=ending == "safetensors", **split)
    assert all(kind in f.name for f in (tmp_path / "a" / "unet").iterdir() if f.name != "config.json")
    assert same(read(str(tmp_path / "a"))[0], plain)


def test_a_mark_and_lines_of_windows_are_no_part_of_settings(folders, tmp_path):
    """As editors there save them."""
    shutil.copytree(folders / "sd1", tmp_path / "a")
    for path in (tmp_path / "a").rglob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert same(read(str(tmp_path / "a"))[0], read(str(folders / "sd1"))[0])


def test_a_file_without_its_autoencoder_takes_the_one_that_is_named(files, tmp_path, monkeypatch, capsys):
    """Its scale is the autoencoder's own, or, where that does not say it, the family's of the network."""
    weights = {n: x for n, x in load_tensors(files / "xl.safetensors").items() if not n.startswith("first_stage_model.")}
    save_tensors(weights, tmp_path / "bare.safetensors")
    alone = {
        n.removeprefix("first_stage_model."): x for n, x in load_tensors(files / "xl.safetensors").items() if n not in weights
    }
    save_tensors(alone, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="--autoencoder"):
        write(read(str(tmp_path / "bare.safetensors"))[0], tmp_path / "no", "ldm", source="it")
    for name, vae in (("a", tmp_path / "vae.safetensors"), ("b", files / "xl" / "vae"), ("c", files / "xl.safetensors")):
        words = [str(tmp_path / "bare.safetensors"), str(tmp_path / name), "--to", "ldm", "--autoencoder", str(vae)]
        monkeypatch.setattr("sys.argv", ["", *words])
        main()
        assert ("scale: 0.13025, of this family" in capsys.readouterr().out) == (name != "b")
        std = load_autoencoder(str(tmp_path / name / "autoencoder")).std
        torch.testing.assert_close(std, torch.full((4,), 1 / 0.13025))
    bundle = read(str(tmp_path / "vae.safetensors"))[0]
    assert bundle.assumed[0].startswith("scale: 0.18215")


def test_inpainting_of_xl_travels_both_ways(tmp_path):
    from diffusers import StableDiffusionXLInpaintPipeline as Made

    plain = their_pipeline("xl", tmp_path / "words")
    extra = {n: plain.unet.config[n] for n in ("addition_embed_type", "addition_time_embed_dim", "use_linear_projection")}
    extra |= {n: plain.unet.config[n] for n in ("projection_class_embeddings_input_dim", "attention_head_dim")}
    unet = their_unet((False, True), 64 + 128, spatial=5, transformer_layers_per_block=(1, 3), **extra)
    Made(**{**{n: getattr(plain, n) for n in plain.components if n in COMPONENTS}, "unet": unet}).save_pretrained(tmp_path / "a")
    write(read(str(tmp_path / "a"))[0], tmp_path / "ours", "ldm")
    write(read(str(tmp_path / "ours"))[0], tmp_path / "b", "diffusers")
    again = Made.from_pretrained(tmp_path / "b")
    assert all(torch.equal(x, again.unet.state_dict()[n]) for n, x in unet.state_dict().items())
    assert not again.config.requires_aesthetics_score


COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def test_what_diffusers_named_otherwise_is_the_same_network(tmp_path):
    """Attention of `query`, `key`, `value` and `proj_attn`, in the U-Net of LDM's first folders too."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    unconditional(tmp_path / "w").save_pretrained(tmp_path / "a")
    plain = read(str(tmp_path / "a"))[0]
    for part in ("unet", "vqvae"):
        path = tmp_path / "a" / part / "diffusion_pytorch_model.safetensors"
        weights = load_tensors(path)
        for now, then in old.items():
            weights = {n.replace(f".{now}.", f".{then}."): x for n, x in weights.items()}
        save_tensors(weights, path)
    assert any(".query." in n for n in weights) and same(read(str(tmp_path / "a"))[0], plain)


# ---- what a single file says of itself, in its header, its tables and the yaml beside it


def bare(home, weights, header=None, told=None):
    """A single file, and the yaml beside it -> what is read of it."""
    path = home / "m.safetensors"
    save_file({"header": torch.zeros(1)}, path, header)  # without the tensors, which are given apart
    path.with_suffix(".yaml").unlink(missing_ok=True)
    if told is not None:
        path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": told}}))
    return read_file(path, weights)[0]


@pytest.fixture(scope="module")
def weights(files):
    return {kind: load_tensors(files / f"{kind}.safetensors") for kind in ("sd1", "xl")}


SGM = "sgm.modules.diffusionmodules.denoiser_scaling."
SAYS = [({"modelspec.prediction_type": "epsilon"}, None, "Noise"), ({"modelspec.prediction_type": "v"}, None, "Velocity")]
SAYS += [({"modelspec.architecture": "stable-diffusion-v2-768-v/x"}, None, "Velocity"), ({"modelspec.title": "a"}, None, "Noise")]
SAYS += [(None, {"denoiser_config": {"params": {"scaling_config": {"target": f"{SGM}{s}Scaling"}}}}, k) for s, k in
         (("Eps", "Noise"), ("V", "Velocity"))]  # fmt: skip


@pytest.mark.parametrize("header, told, kind", SAYS)
def test_a_file_says_what_its_network_says(weights, tmp_path, header, told, kind):
    assert bare(tmp_path, weights["xl"], header, told).recipe["prediction"]["_target_"] == f"ldm.prediction.{kind}"


def test_what_a_file_says_twice_or_strangely_is_refused(weights, tmp_path):
    scaling = {"denoiser_config": {"params": {"scaling_config": {"target": f"{SGM}EDMScaling"}}}}
    for header, told, words in (
        ({"modelspec.prediction_type": "v"}, {"parameterization": "eps"}, "says velocity, its yaml says noise. Say which"),
        ({"modelspec.prediction_type": "flow"}, None, "modelspec.prediction_type=flow; epsilon, v"),
        (None, scaling, "EDMScaling; EpsScaling, VScaling are known"),
        (None, {"timesteps": 4000}, "timesteps=4000; 1000 is known"),
        (None, {"beta_schedule": "cosine"}, "beta_schedule=cosine; linear is known"),
        (None, {"linear_start": "x"}, "has betas from .*; numbers were wanted"),
        (None, {"scale_factor": -1}, "scale_factor=-1; a number above 0"),
        (None, {"unet_config": {"params": {"num_heads": "8"}}}, "num_heads=8, num_head_channels=-1; whole numbers"),
        (None, {"unet_config": [1]}, r"unet_config=\[1\]; a target and params were wanted"),
        (None, {"cond_stage_config": {"params": {"layer": "hidden", "layer_idx": 11}}}, "layer=hidden, layer_idx=11; last and"),
    ):
        with pytest.raises(Refusal, match=words):
            bare(tmp_path, weights["sd1"], header, told)
    assert "yaml: magic, which nothing here reads" in bare(tmp_path, weights["sd1"], None, {"magic": 3}).assumed


def test_the_layer_of_a_text_tower_that_a_header_names(weights, tmp_path):
    held = bare(tmp_path, weights["sd1"], {"modelspec.encoder_layer": "2"})
    assert held.recipe["condition"]["text"]["layers"] == [-2]
    assert "hidden layer: -2 of condition.text, as modelspec.encoder_layer says" in held.assumed


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_a_files_tables_are_its_schedule_in_any_precision(weights, tmp_path, kind):
    """Betas, cumulated alphas and the scale, as `.half()` leaves them; with zero terminal SNR; of another schedule."""
    for start, end, scale in ((0.00085, 0.012, 0.18215), (0.0015, 0.0195, 0.22)):
        peer = DDIMScheduler(beta_schedule="scaled_linear", beta_start=start, beta_end=end)
        tables = {"betas": peer.betas, "alphas_cumprod": peer.alphas_cumprod, "scale_factor": torch.tensor(scale)}
        held = bare(tmp_path, weights["sd1"] | {n: x.to(kind) for n, x in tables.items()})
        assert held.recipe["schedule"] == {"_target_": "ldm.schedule.ScaledLinear", "beta_start": start, "beta_end": end}
        torch.testing.assert_close(held.parts["autoencoder"].weights["std"][0], torch.tensor(1 / scale))
    peer = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True)
    gone = {"alphas_cumprod": peer.alphas_cumprod.to(kind), "v_pred": torch.tensor([])}
    assert bare(tmp_path, weights["xl"] | gone).recipe["schedule"]["zero_terminal_snr"]
    with pytest.raises(Refusal, match="zero terminal SNR"):
        bare(tmp_path, weights["sd1"] | {"alphas_cumprod": gone["alphas_cumprod"]})
    for wrong, told in (
        ({"alphas_cumprod": tables["alphas_cumprod"]}, None),
        ({"betas": tables["betas"][:500]}, None),
        ({"betas": tables["betas"]}, {"linear_start": 0.00085, "linear_end": 0.012}),
    ):
        with pytest.raises(Refusal, match="square roots are linear"):
            bare(tmp_path, weights["sd1"] | {n: x.to(kind) for n, x in wrong.items()}, None, told)


WRAPPED = {
    "ddp": lambda n: f"module.{n}",
    "compile": lambda n: n.replace("model.diffusion_model.", "model._orig_mod.diffusion_model."),
    "lightning": lambda n: f"net.{n}",
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped_names_are_the_same_model(weights, files, tmp_path, how):
    save_tensors({WRAPPED[how](n): x for n, x in weights["sd1"].items()}, tmp_path / "m.safetensors")
    assert same(read(str(tmp_path / "m.safetensors"))[0], read(str(files / "sd1.safetensors"))[0])


def test_averages_stand_in_for_what_was_trained_all_or_none(weights, tmp_path):
    net = {n: x for n, x in weights["sd1"].items() if n.startswith("model.")}
    averages = {"model_ema." + n.removeprefix("model.").replace(".", ""): x + 1 for n, x in net.items()}
    counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    held = bare(tmp_path, weights["sd1"] | averages | counts)
    assert f"weights: {len(net)} averages (model_ema) in the place of those that were trained" in held.assumed
    name = "denoiser.backbone.out.2.bias"
    assert torch.equal(held.weights[name], weights["sd1"]["model.diffusion_model.out.2.bias"] + 1)
    with pytest.raises(Refusal, match=f"averages .* of 5 tensors of the U-Net's {len(net)}"):
        bare(tmp_path, weights["sd1"] | dict(list(averages.items())[:5]))


def test_an_autoencoder_in_a_file_of_its_own(weights, files, tmp_path):
    """With the prefix that it has inside a whole model, or Lightning's, or none, and what its training left there."""
    whole = {n: x for n, x in weights["sd1"].items() if n.startswith("first_stage_model.")}
    wanted = read(str(files / "sd1.safetensors"))[0].parts["autoencoder"].weights
    left = {"scale_factor": torch.tensor(0.18215), "betas": torch.zeros(1)}
    for prefix, more in (
        ("first_stage_model.", {}),
        ("first_stage_model.", left),
        ("autoencoder.", {}),
        ("", {"loss.w": wanted["std"]}),
    ):
        held = bare(tmp_path, {n.replace("first_stage_model.", prefix): x for n, x in whole.items()} | more)
        assert held.recipe is None and all(torch.equal(x, wanted[n]) for n, x in held.parts["autoencoder"].weights.items())
    for names, words in (
        ({"encoder.conv_in.weight": 0, "encoder.down_blocks.0.x": 0}, "of diffusers' names; name the folder"),
        ({"input_blocks.0.0.weight": 0}, "is a U-Net alone"),
    ):
        with pytest.raises(Refusal, match=words):
            bare(tmp_path, {n: torch.zeros(1) for n in names})
