"""Discrepancies, variety and coverage against closed forms, and the published formulas on the same features."""

import math

import numpy as np
import pytest
import torch

from ldm.metric.density_coverage import DensityCoverage
from ldm.metric.mmd import MMD
from ldm.metric.vendi import Vendi


class Stub:
    def __init__(self):
        self.protocol = {"extractor": "pixels"}


class Reals:
    def __init__(self, rows):
        self.rows = lambda: {"features": rows}


def value(metric, own, real=None):
    return {name: e.value for name, e in metric.compute({"features": own}, None if real is None else Reals(real)).items()}


def test_cmmd_is_the_published_formula():
    """google-research's cmmd/distance.py: sigma 10, times 1000, means over all pairs of unit vectors."""
    own, real = torch.randn(30, 8), torch.randn(40, 8) + 0.5
    x, y = (f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=1, keepdims=True) for f in (own, real))

    def k(a, b):
        return np.exp(-(-2 * a @ b.T + (a * a).sum(1)[:, None] + (b * b).sum(1)) / (2 * 10**2)).mean()

    assert value(MMD(Stub), own, real)["cmmd"] == pytest.approx(1000 * (k(x, x) + k(y, y) - 2 * k(x, y)), rel=1e-6)


def test_discrepancy_of_points_has_its_closed_form(monkeypatch):
    """Two opposite points: 2 (1 - exp(-4 / 2 sigma^2)); a set and itself, in blocks: 0."""
    monkeypatch.setattr("ldm.metric.mmd.CHUNK", 7)
    one = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    assert value(MMD(Stub, sigma=1.0, scale=1.0), one, -one)["cmmd"] == pytest.approx(2 * (1 - math.exp(-2)))
    x = torch.randn(20, 4)
    assert value(MMD(Stub), x, x)["cmmd"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="4 wide, the reference's 5"):
        value(MMD(Stub), x, torch.randn(20, 5))


@pytest.mark.parametrize("width", [6, 40])
def test_vendi_counts_what_is_different(width):
    """1 for copies of one, n for n unlike, exp(entropy of the shares) for some of each; by either of the two matrices."""
    eye = torch.eye(6, width)
    assert value(Vendi(Stub), 3 * eye[:1].repeat(12, 1))["vendi"] == pytest.approx(1)
    assert value(Vendi(Stub), eye)["vendi"] == pytest.approx(6)
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert value(Vendi(Stub), eye[[0, 0, 1, 2]])["vendi"] == pytest.approx(torch.special.entr(shares).sum().exp().item())
    x = torch.nn.functional.normalize(torch.randn(9, width).double(), dim=1)
    eigen = np.linalg.eigvalsh((x @ x.T / 9).numpy()).clip(1e-30)
    assert value(Vendi(Stub), x)["vendi"] == pytest.approx(math.exp(-(eigen * np.log(eigen)).sum()))


def test_density_and_coverage_are_prdcs():
    """clovaai's prdc, line by line in numpy."""
    own, real, k = torch.randn(60, 3) * 0.8, torch.randn(50, 3), 5
    between = np.linalg.norm(real.numpy()[:, None] - own.numpy()[None], axis=2)
    within = np.linalg.norm(real.numpy()[:, None] - real.numpy()[None], axis=2)
    radius = np.sort(within, axis=1)[:, k]
    density, coverage = (between < radius[:, None]).sum(0).mean() / k, (between.min(1) < radius).mean()
    found = value(DensityCoverage(Stub), own, real)
    assert found == pytest.approx({"density": density, "coverage": coverage})
    with pytest.raises(ValueError, match="more than k=5 real pictures; found 5"):
        value(DensityCoverage(Stub), own, real[:5])


def test_equal_distributions_have_density_1_and_the_expected_coverage():
    """Lemmas 1 and 2: coverage 1 - (N-1)...(N-k) / ((M+N-1)...(M+N-k)), by chance of who is a picture's neighbour."""
    n, m, k, runs = 40, 30, 3, 200
    found = [value(DensityCoverage(Stub, k=k), torch.randn(m, 2), torch.randn(n, 2)) for _ in range(runs)]
    wanted = 1 - math.prod((n - 1 - i) / (m + n - 1 - i) for i in range(k))
    for name, truth in (("density", 1.0), ("coverage", wanted)):
        values = np.array([f[name] for f in found])
        assert abs(values.mean() - truth) < 4 * values.std() / runs**0.5, name
    far = value(DensityCoverage(Stub, k=k), torch.randn(m, 2) + 100, torch.randn(n, 2))
    assert far == {"density": 0, "coverage": 0}
