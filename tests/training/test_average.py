"""Averages of any length, made after training from snapshots, against the averages themselves."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.training.average import exponent, main, reconstruct, weights_of
from ldm.training.callback.power_ema import PowerEMA

STEPS = 400


def walked(folder, stds=(0.05, 0.1), every=25, resume_at=None):
    """A random walk of weights under PowerEMA -> its positions: (STEPS, 3)."""
    generator = torch.Generator().manual_seed(0)
    module, trainer = nn.Module(), SimpleNamespace(global_step=0, is_global_zero=True)
    module.model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(module.model.weight)
    callback, positions = PowerEMA(folder, every, stds), []
    callback.on_train_start(trainer, module)
    for step in range(1, STEPS + 1):
        if step == resume_at:
            kept, callback = callback.state_dict(), PowerEMA(folder, every, stds)
            callback.load_state_dict(kept)
            callback.on_train_start(trainer, module)
        with torch.no_grad():
            module.model.weight.add_(torch.randn(1, 3, generator=generator) / STEPS**0.5 + 2 / STEPS)
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module)
        positions.append(module.model.weight.detach()[0].double().clone())
    callback.on_train_end(trainer, module)
    return torch.stack(positions), callback


def power_mean(positions, std):
    """The average whose weights are n^gamma over each step's interval."""
    n = torch.arange(len(positions) + 1, dtype=torch.float64) / len(positions)
    return (n ** (exponent(std) + 1)).diff() @ positions


def test_exponents_are_the_papers():
    """Section 3.1: std 0.05 is gamma 16.97 and 0.10 is 6.94."""
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3) and exponent(0.1) == pytest.approx(6.94, abs=5e-3)
    for std in (0.01, 0.2, 0.28):
        n = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        p = n ** exponent(std) / (n ** exponent(std)).sum()
        assert ((p * n**2).sum() - (p * n).sum() ** 2).sqrt().item() == pytest.approx(std, rel=1e-3)
    with pytest.raises(ValueError, match=r"std=0\.5"):
        exponent(0.5)


def test_the_average_kept_is_the_power_mean_and_survives_a_resume(tmp_path):
    positions, callback = walked(tmp_path / "a")
    _, resumed = walked(tmp_path / "b", resume_at=137)
    for std in ("0.050", "0.100"):
        kept = callback.averages[std]["model.weight"][0]
        torch.testing.assert_close(kept.double(), power_mean(positions, float(std)), atol=1e-5, rtol=1e-5)
        assert torch.equal(kept, resumed.averages[std]["model.weight"][0])


@pytest.mark.parametrize("std", [0.05, 0.06, 0.08, 0.1, 0.15])
def test_any_length_is_reconstructed(tmp_path, std):
    positions, _ = walked(tmp_path)
    average, error = reconstruct(tmp_path, std)
    wanted, spread = power_mean(positions, std), positions.std().item()
    assert error < 0.03 and (average["weight"][0].double() - wanted).abs().max() < 0.02 * spread
    assert average.keys() == {"weight"} and average["weight"].dtype == torch.float32


def test_a_snapshot_is_reconstructed_as_itself_and_earlier_ends_too(tmp_path):
    positions, _ = walked(tmp_path)
    average, error = reconstruct(tmp_path, 0.1, step=200)
    assert error < 1e-4
    torch.testing.assert_close(average["weight"][0].double(), power_mean(positions[:200], 0.1), atol=2e-3, rtol=0)
    weights, _ = weights_of([(200, 7.0), (400, 7.0)], (400, 7.0))
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="go to step 400"):
        reconstruct(tmp_path, 0.1, step=500)
    with pytest.raises(FileNotFoundError, match="power_ema"):
        reconstruct(tmp_path / "nothing", 0.1)


def test_the_command_makes_a_model_of_the_average(tmp_path, capsys):
    """From a run that trained, to a folder that loads."""
    from ldm.build import build_stage, load_model
    from ldm.compose import compose_config
    from ldm.training.callback.ema import trained

    small = ["condition=[label]", "backbone=mlp", "backbone.size=4", "autoencoder=identity"]
    stage = build_stage(compose_config("train", small))
    stage.export(tmp_path / "run")
    callback, trainer = PowerEMA(tmp_path / "run" / "averages", 1), SimpleNamespace(global_step=0, is_global_zero=True)
    callback.on_train_start(trainer, stage)
    for step in range(1, 4):
        for weight in trained(stage).values():
            weight.data += 1
        trainer.global_step = step
        callback.on_train_batch_end(trainer, stage)
    main([str(tmp_path / "run"), str(tmp_path / "out"), "--std", "0.1"])
    assert "The average of std 0.1 is in" in capsys.readouterr().out
    before, after = (dict(load_model(tmp_path / name).denoiser.named_parameters()) for name in ("run", "out"))
    wanted = power_mean(torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64), 0.1).item()
    for name in before:
        torch.testing.assert_close(after[name] - before[name], torch.full_like(before[name], wanted), atol=5e-3, rtol=0)
    with pytest.raises(SystemExit, match="error: There are no snapshots"):
        main([str(tmp_path / "out"), str(tmp_path / "again"), "--std", "0.1"])
