"""ONNX Runtime on the CPU as a peer of inference: the eager network exported by ``torch.onnx``."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.protocol import Prepared, Unavailable

if TYPE_CHECKING:
    from harness.networks import ModuleBench

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def prepare(bench: ModuleBench) -> Prepared:
    """The network in a session of ONNX Runtime with as many threads as torch has.

    Raises:
        Unavailable: a package is missing, or this is no inference in fp32 on the CPU.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not installed")
    if bench.device.type != "cpu" or bench.setting.training or bench.setting.dtype != torch.float32:
        raise Unavailable("is compared in fp32 inference on the CPU alone")
    session = _session(copy.deepcopy(bench.module).eval(), bench.x)
    feed = {session.get_inputs()[0].name: bench.x.contiguous().numpy()}
    return Prepared(lambda: session.run(None, feed)[0], lambda out: {"output": torch.from_numpy(out)[: bench.few]})


def _session(model: torch.nn.Module, x: torch.Tensor) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _quiet(name: str) -> Any:
    logger = logging.getLogger(name)
    kept = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(kept)
