"""One thread, one seed, no TF32; tests marked ``gpu`` are skipped, with the reason, where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("resnet_fused", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("resnet_fused")
torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
