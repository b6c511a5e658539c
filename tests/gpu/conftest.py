"""On a GPU:  python -m pytest -m gpu tests/gpu      without one, to try the tests themselves:  LDM_DRY_GPU=1 python -m pytest ...

They need what training needs, and pytest; neither network nor files but the emoji that ship with the project.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of deterministic products, read once

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DRY = os.environ.get("LDM_DRY_GPU") == "1"


def pytest_collection_modifyitems(items):
    """Marks what is in this folder, and skips it where there is no GPU."""
    why = "there is no GPU (torch.cuda.is_available()); LDM_DRY_GPU=1 runs these tests on the CPU"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not (DRY or torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if DRY else "cuda")


@pytest.fixture
def on(device):
    """Settings of a trainer on the device."""
    return {"accelerator": "cpu" if device.type == "cpu" else "gpu", "devices": 1}


@pytest.fixture(autouse=True)
def exact_products():
    """float32 is float32: cuDNN's convolutions would round to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
    torch._dynamo.reset()
