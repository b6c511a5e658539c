"""A scheduler's config says what its class means: every class with a table of betas, every key, and the steps that it visits."""

import inspect

import diffusers
import pytest
import torch

from ldm.errors import Refusal
from ldm.files.folder import write_json
from ldm.interop.schedulers import DRAWING, GRID, MEANS, MODEL, REFUSED, SILENT, TAKES, USUAL, read_schedule
from ldm.sampler.grid import Distilled, Karras, Leading, Linspace, Trailing
from ldm.schedule import ScaledLinear

ODD = (None, "x", [], {}, -1, 1.5, [1], float("nan"))


def keys_of(made):
    return {n: p.default for n, p in inspect.signature(made.__init__).parameters.items() if n not in ("self", "kwargs")}


SPELT = {n: getattr(diffusers, n) for n in dir(diffusers) if n.endswith("Scheduler") and inspect.isclass(getattr(diffusers, n))}
# Tables of betas that no pipeline of this family is drawn from: another shift, the way back, a table of its own.
ELSEWHERE = {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"}
ELSEWHERE |= {"RePaintScheduler", "UnCLIPScheduler"}


def test_every_scheduler_with_betas_is_known():
    assert {n for n, made in SPELT.items() if "beta_schedule" in keys_of(made)} == (
        TAKES.keys() | ELSEWHERE
    ) & SPELT.keys() - OPTIONAL


OPTIONAL = {"DPMSolverSDEScheduler"}  # whose signature is hidden where torchsde is not installed


@pytest.mark.parametrize("kind", TAKES)
def test_every_key_of_a_scheduler_is_known(kind, tmp_path):
    path = tmp_path / "scheduler_config.json"
    theirs = keys_of(SPELT[kind])
    means = {**USUAL, **MEANS.get(kind, {})}
    if "beta_start" not in theirs:
        pytest.skip("its signature is hidden: torchsde is not installed")
    assert TAKES[kind] == theirs.keys() and TAKES[kind] <= {*MODEL, *GRID, *DRAWING, *SILENT, *REFUSED}
    assert {name: theirs[name] for name in means if name in theirs} == {n: v for n, v in means.items() if n in theirs}
    write_json({"_class_name": kind}, path)
    schedule, says, grid, remarks = read_schedule(tmp_path)
    assert schedule["_target_"].endswith({"linear": "DDPM", "scaled_linear": "ScaledLinear"}[theirs["beta_schedule"]])
    assert says == "Noise" and (schedule["beta_start"], schedule["beta_end"]) == (theirs["beta_start"], theirs["beta_end"])
    assert grid in (None, "distilled") or f"{kind} means {grid.split()[0]}" in remarks[0]
    assert kind != "LCMScheduler" or (grid, remarks) == ("distilled", [])
    write_json({"_class_name": kind, "use_karras_sigmas": True, "thresholding": True}, path)
    _, _, again, remarks = read_schedule(tmp_path)
    assert again == ("karras" if "use_karras_sigmas" in theirs else grid)
    assert ("thresholding=True" in str(remarks)) == ("thresholding" in theirs)
    for key, value in (("trained_betas", [0.1]), ("beta_schedule", "sigmoid"), ("prediction_type", "flow"), ("new", 3)):
        write_json({"_class_name": kind, key: value}, path)
        with pytest.raises(ValueError, match=key):
            read_schedule(tmp_path)
    for key in TAKES[kind] & {*MODEL, *GRID}:
        for odd in ODD:
            write_json({"_class_name": kind, key: odd}, path)
            try:
                read_schedule(tmp_path)
            except Refusal as error:
                assert key in str(error) or "betas" in str(error)


GRIDS = {"leading": Leading, "linspace": Linspace, "trailing": Trailing, "karras": Karras, "distilled": Distilled}
SAME = sorted(n for n in TAKES if n not in ("TCDScheduler", "PNDMScheduler", *OPTIONAL) and "KDPM2" not in n)


@pytest.mark.parametrize("kind", SAME)
def test_steps_are_those_of_the_scheduler(kind, tmp_path):
    """As it is configured, by whatever spacing, offset and sigmas: the printed words visit the times that it visits."""
    theirs = keys_of(SPELT[kind])
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    told = [{"timestep_spacing": s, "steps_offset": o} for s in ("leading", "linspace", "trailing") for o in (0, 1, 2)]
    told += [{"original_inference_steps": 25}, {"original_inference_steps": 37}]
    told += [{"use_karras_sigmas": True, "timestep_spacing": "linspace"}, {}]
    for said in told:
        if said.keys() - theirs.keys():
            continue
        write_json({"_class_name": kind, **table, **said}, tmp_path / "scheduler_config.json")
        node, _, words, _ = read_schedule(tmp_path)
        name, *settings = words.split()
        grid = GRIDS[name](**{x.split(".")[-1].split("=")[0]: int(x.split("=")[1]) for x in settings})
        schedule = ScaledLinear(**{n: v for n, v in node.items() if n[0] != "_"})
        peer = SPELT[kind](**table, **said)
        peer.set_timesteps(7)
        visited = peer.timesteps.double().unique().flip(0)
        ours = grid(7, schedule)[:-1] * 1000 - 1
        torch.testing.assert_close(ours, visited, atol=0.51, rtol=0)


@pytest.mark.parametrize("wrong", [{"original_inference_steps": 0}, {"timestep_scaling": "x"}, {"original_inference_steps": 1.5}])
def test_a_consistency_scheduler_of_no_steps_is_refused(wrong, tmp_path):
    write_json({"_class_name": "LCMScheduler", **wrong}, tmp_path / "scheduler_config.json")
    with pytest.raises(Refusal, match="a whole number from 1 to 1000 and a number above 0"):
        read_schedule(tmp_path)


def test_steps_that_no_grid_here_has_are_said(tmp_path):
    """Karras' sigmas between the first and last step of a spacing: the ends at 30 steps are the printed ones."""
    for spacing in ("leading", "trailing"):
        told = {
            "_class_name": "EulerDiscreteScheduler",
            "use_karras_sigmas": True,
            "timestep_spacing": spacing,
            "steps_offset": 1,
        }
        told |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        write_json(told, tmp_path / "scheduler_config.json")
        node, _, words, remarks = read_schedule(tmp_path)
        said = [x.removeprefix("sampler.grid.").split("=") for x in remarks[0].split() if x.startswith("sampler")]
        peer = diffusers.EulerDiscreteScheduler(**{n: v for n, v in told.items() if n[0] != "_"})
        peer.set_timesteps(30)
        schedule = ScaledLinear(**{n: v for n, v in node.items() if n[0] != "_"})
        ends = {name: float(end) for name, end in said}
        assert words == "karras"
        torch.testing.assert_close(Karras(**ends)(30, schedule)[:-1] * 1000 - 1, peer.timesteps.double(), atol=0.6, rtol=0)


def test_a_scheduler_is_the_class_that_its_pipeline_names(tmp_path):
    write_json(
        {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 0}, tmp_path / "scheduler_config.json"
    )
    assert read_schedule(tmp_path)[2] == "leading sampler.grid.offset=0"
    assert read_schedule(tmp_path, pipeline="StableDiffusionPipeline")[2] == "leading"
    assert read_schedule(tmp_path, "EulerDiscreteScheduler")[2] == "linspace"
    with pytest.raises(ValueError, match="a FlowMatchEulerDiscreteScheduler"):
        read_schedule(tmp_path, "FlowMatchEulerDiscreteScheduler")
