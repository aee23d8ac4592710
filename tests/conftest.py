"""One thread, one seed, no TF32; where there is no GPU, tests marked ``gpu`` are skipped and Triton interprets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import settings

# Triton reads this as its kernels are defined, so it is set before anything imports Triton; torch alone does not.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The extension's module, the emulated one where there is no GPU. What kernels do not write is NaN."""
    from resnet_fused import extension
    from resnet_fused.cuda import conv3x3

    if not torch.cuda.is_available():
        import emulated

        emulated.module().settings()
        monkeypatch.setattr(extension, "module", emulated.module())
    elif extension.module is None:
        pytest.skip(str(extension.reason))
    conv3x3._built.cache_clear()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield extension.module
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def planning():
    """Plans on the CPU too, and none from before."""
    from resnet_fused import plans

    plans.forget()
    with plans.everywhere():
        yield
    plans.forget()
