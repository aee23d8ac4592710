"""Loading of the extension, the texts of its argument checks (made before any launch), and its kernel on a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from resnet_fused import extension

needs_extension = pytest.mark.skipif(extension.module is None, reason=str(extension.reason))

FINALIZE = {
    **dict.fromkeys(("count", "mean", "m2", "gamma", "beta", "scale", "shift", "batch_mean", "rstd"), 64),
    **{"var_unbiased": 64, "workspace": 64, "tiles": 3, "channels": 8, "eps": 1e-5, "device": 0, "stream": 0},
}


# --- loading: in a process of its own, from a package that holds extension.py alone -----------------------------------


def load(folder: Path, *, binary: bytes | None, record: dict | str | None) -> dict:
    """What importing `extension` gives: loaded or not, reason, record, warnings, and whether torch came along."""
    package = folder / "resnet_fused"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(extension.__file__, package)
    if binary is not None:
        (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(binary)
    if isinstance(record, dict):
        record = json.dumps({"soabi": sysconfig.get_config_var("SOABI"), **record})
    if record is not None:
        (package / "_build_info.json").write_text(record)
    code = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    from resnet_fused import extension
    extension.build_info()
    import resnet_fused.extension
print(json.dumps({
    "loaded": extension.module is not None, "reason": extension.reason, "info": extension.build_info(),
    "warnings": [[w.category.__name__, str(w.message)] for w in seen], "torch": "torch" in sys.modules,
}))
"""
    # -S: without site-packages the installed package cannot stand in for the missing binary.
    run = subprocess.run([sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_broken_binary_is_a_stored_reason_and_one_warning(tmp_path):
    seen = load(tmp_path, binary=b"not an ELF file", record={"outcome": "built", "reason": None})
    assert not seen["loaded"]
    assert not seen["torch"]
    assert "_C was built but does not load (ImportError: " in seen["reason"]
    assert "RESNET_FUSED_CUDA=require" in seen["reason"]
    assert seen["warnings"] == [["RuntimeWarning", seen["reason"]]]


def test_lost_binary_is_a_stored_reason_and_one_warning(tmp_path):
    seen = load(tmp_path, binary=None, record={"outcome": "built", "reason": None})
    assert "its file is gone" in seen["reason"]
    assert len(seen["warnings"]) == 1


def test_skipped_build_is_silent(tmp_path):
    seen = load(tmp_path, binary=None, record={"outcome": "skipped", "reason": "no CUDA toolkit was found"})
    assert seen["reason"] == "resnet_fused._C was not built because no CUDA toolkit was found"
    assert seen["warnings"] == []


def test_failed_build_warns_only_where_a_driver_is(tmp_path):
    seen = load(tmp_path, binary=None, record={"outcome": "failed", "reason": "the compilation failed", "log": ["x"]})
    assert "failed to build because the compilation failed" in seen["reason"]
    assert len(seen["warnings"]) == extension._driver_present()
    assert seen["info"]["log"] == ["x"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "no build is recorded"),
        ("{", "cannot be read"),
        ('{"outcome": "built"}', "cannot be read"),
        ('{"outcome": "guessed", "soabi": ""}', "holds the outcome 'guessed'"),
        ('{"outcome": "built", "soabi": "cpython-27"}', "for another Python, cpython-27"),
    ],
)
def test_missing_or_odd_record_is_unknown(tmp_path, record, reason):
    seen = load(tmp_path, binary=None, record=record)
    assert seen["info"]["outcome"] == "unknown"
    assert reason in seen["info"]["reason"]
    assert seen["warnings"] == []


def test_this_installation_has_a_record():
    info = extension.build_info()
    assert info["outcome"] in ("built", "skipped", "failed")
    assert (extension.module is None) == (info["outcome"] != "built")
    if info["outcome"] == "built":
        assert all(info[key] for key in ("archs", "nvcc", "toolkit", "compiler", "cmake", "pybind11", "flags"))


# --- what the extension answers without a GPU -------------------------------------------------------------------------


@needs_extension
def test_device_info_gives_devices_or_the_reason():
    info = extension.module.device_info()
    assert info["runtime_version"] >= (12, 0)
    if info["error"] is None:
        assert info["driver_version"] >= (12, 0)
        wanted = {"name", "capability", "multiprocessors", "shared_memory_per_block", "l2_cache", "memory"}
        assert all(set(device) == wanted for device in info["devices"])
    else:
        assert info["devices"] == []
        assert "CUDA" in info["error"]


@needs_extension
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"tiles": -1}, "bn_finalize: expected tiles to be between 0 and 2147483647, got -1"),
        ({"tiles": 2**31}, "bn_finalize: expected tiles to be between 0 and 2147483647, got 2147483648"),
        ({"channels": -8}, "bn_finalize: expected channels to be between 0 and 2147483647, got -8"),
        ({"channels": 2**31}, "bn_finalize: expected channels to be between 0 and 2147483647, got 2147483648"),
        ({"eps": -1.0}, "bn_finalize: expected eps to be finite and not negative, got -1"),
        ({"eps": float("nan")}, "bn_finalize: expected eps to be finite and not negative, got nan"),
        ({"eps": float("inf")}, "bn_finalize: expected eps to be finite and not negative, got inf"),
        ({"device": -1}, "bn_finalize: expected device to be the index of a CUDA device, got -1"),
        *(
            ({name: 0}, f"bn_finalize: expected {name} to be a device pointer, got a null pointer")
            for name in ("count", "mean", "m2", "scale", "shift", "batch_mean", "rstd", "var_unbiased")
        ),
        (
            {"workspace": 0, "tiles": 1000},
            "bn_finalize: expected workspace to be a device pointer, got a null pointer",
        ),
        ({"workspace": 68, "tiles": 1000}, "bn_finalize: expected workspace to be aligned to 8 bytes, got 68"),
    ],
)
def test_bad_arguments_throw_before_any_launch(changed, text):
    with pytest.raises(ValueError) as caught:
        extension.module.bn_finalize(**{**FINALIZE, **changed})
    assert str(caught.value) == text


@needs_extension
def test_no_channels_is_no_launch():
    extension.module.bn_finalize(**{**FINALIZE, "channels": 0, "scale": 0, "mean": 0})


@needs_extension
def test_workspace_grows_with_slices_and_checks_sizes():
    workspace = extension.module.bn_finalize_workspace
    assert workspace(0, 64) == workspace(256, 64) == 0
    assert workspace(257, 64) == 2 * (8 + 2 * 4 * 64)
    assert workspace(100_000, 4096) == 391 * (8 + 2 * 4 * 4096)
    assert workspace(2**31 - 1, 1) == 1024 * 16
    with pytest.raises(
        ValueError, match="bn_finalize_workspace: expected tiles to be between 0 and 2147483647, got -1"
    ):
        workspace(-1, 64)


@needs_extension
def test_cuda_errors_name_file_call_and_text():
    if extension.module.device_info()["error"] is None:
        pytest.skip("a driver is present, and the launch would read the fake pointers")
    with pytest.raises(RuntimeError, match=r"^csrc/common/launch\.h:\d+: cuda\w+\(.*\): cudaError\w+ \(.+\)$"):
        extension.module.bn_finalize(**FINALIZE)


@needs_extension
def test_a_convolution_checks_its_sizes_and_asks_for_a_device_when_it_is_planned():
    sizes = {"images": 2, "height": 6, "width": 5, "channels": 16, "filters": 24, "dilation": 1, "groups": 1}
    assert extension.module.emulated is False
    with pytest.raises(ValueError, match=r"^conv3x3: expected stride to be between 1 and 3, got 4$"):
        extension.module.Conv3x3(type="bf16", **sizes, stride=4, device=0)
    problem = extension.module.Conv3x3(type="bf16", **sizes, stride=1, device=0)
    forms = dict.fromkeys(("deferred", "bias", "residual", "relu", "statistics"), False)
    if extension.module.device_info()["error"] is not None:
        with pytest.raises(RuntimeError, match=r"^csrc/common/launch\.h:\d+: cuda\w+\(.*\): cudaError\w+ \(.+\)$"):
            problem.fprop(**forms, config=None)


# --- the glue ---------------------------------------------------------------------------------------------------------


def test_cpu_tensors_are_declined_with_a_reason():
    import torch

    from resnet_fused.cuda import batch_norm

    tiles = torch.ones(3, dtype=torch.int32), torch.zeros(3, 8), torch.zeros(3, 8)
    reason = batch_norm.unsupported_reason(*tiles, None, None, 1e-5)
    if extension.module is None:
        assert reason == extension.reason
    else:
        assert reason == "the kernel reads one CUDA device only, and an argument is on cpu"


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def direct(count, mean, m2, weight, bias, eps):
    """The formula in float64 over the tiles that have values."""
    seen = count > 0
    n, mean, m2 = count[seen, None].astype(np.float64), mean[seen].astype(np.float64), m2[seen].astype(np.float64)
    total = n.sum()
    merged = (n * mean).sum(0) / total
    deviation = (m2 + n * (mean - merged) ** 2).sum(0)
    rstd = 1 / np.sqrt(deviation / total + eps)
    scale = (1 if weight is None else weight.astype(np.float64)) * rstd
    shift = (0 if bias is None else bias.astype(np.float64)) - merged * scale
    return scale, shift, merged, rstd, deviation / (total - 1)


@pytest.mark.gpu
@needs_extension
@pytest.mark.parametrize(
    ("tiles", "channels", "largest"),
    [
        (1, 1, 128),  # nothing to merge
        (7, 33, 128),  # fewer tiles than rows, a partly filled channel group
        (256, 64, 128),  # the most tiles of one slice
        (257, 64, 128),  # the first case of two slices
        (6272, 256, 128),  # ResNet-50, stage 1, batch 256
        (100_000, 16, 128),  # 391 slices
        (300, 2048, 20_000_000),  # 3e9 values: beyond fp32's and int32's count
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_finalize_agrees_with_float64(tiles, channels, largest, affine):
    import torch

    from resnet_fused.cuda import batch_norm

    random = np.random.default_rng(tiles)
    count = random.integers(0 if tiles > 1 else 2, largest, tiles, dtype=np.int32)
    mean = random.normal(3, 1, (tiles, channels)).astype(np.float32)
    m2 = (random.uniform(0.5, 2, (tiles, channels)) * count[:, None]).astype(np.float32)
    mean[count == 0] = np.nan  # an empty tile must not be read
    weight = random.normal(1, 0.3, channels).astype(np.float32) if affine else None
    bias = random.normal(0, 1, channels).astype(np.float32) if affine else None

    arguments = [None if v is None else torch.from_numpy(v).cuda() for v in (count, mean, m2, weight, bias)]
    assert batch_norm.unsupported_reason(*arguments, 1e-5) is None
    first = batch_norm.finalize(*arguments, 1e-5)
    again = batch_norm.finalize(*arguments, 1e-5)
    names = ("scale", "shift", "mean", "rstd", "var_unbiased")
    for name, got, repeated, want in zip(names, first, again, direct(count, mean, m2, weight, bias, 1e-5), strict=True):
        assert torch.equal(got, repeated), f"{name}: two runs differ"
        # About ten roundings of fp32; shift cancels, so its error is relative to its two terms.
        np.testing.assert_allclose(got.cpu(), want, rtol=2e-6, atol=1e-5 if name == "shift" else 0, err_msg=name)


@pytest.mark.gpu
@needs_extension
def test_finalize_carries_nan_and_inf_and_ignores_empty_tiles():
    import torch

    from resnet_fused.cuda import batch_norm

    count = torch.tensor([4, 0, 4], dtype=torch.int32, device="cuda")
    mean = torch.tensor([[1.0, 1.0, 1.0], [9.0, 9.0, 9.0], [1.0, float("nan"), float("inf")]], device="cuda")
    m2 = torch.tensor([[4.0, 4.0, 4.0], [9.0, 9.0, 9.0], [4.0, float("nan"), float("nan")]], device="cuda")
    scale, shift, batch_mean, rstd, var = batch_norm.finalize(count, mean, m2, None, None, 0.0)
    assert batch_mean.tolist()[::2] == [1.0, float("inf")]
    assert (scale[0].item(), shift[0].item(), rstd[0].item()) == (1.0, -1.0, 1.0)
    assert var[0].item() == pytest.approx(8 / 7)
    for result in (scale, shift, rstd, var):
        assert torch.isnan(result[1:]).all()


@pytest.mark.gpu
@needs_extension
def test_finalize_in_a_cuda_graph_and_on_a_side_stream():
    import torch

    from resnet_fused.cuda import batch_norm

    count = torch.full((1000,), 128, dtype=torch.int32, device="cuda")
    mean, m2 = torch.randn(1000, 64, device="cuda"), torch.rand(1000, 64, device="cuda")
    want = batch_norm.finalize(count, mean, m2, None, None, 1e-5)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = batch_norm.finalize(count, mean, m2, None, None, 1e-5)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = batch_norm.finalize(count, mean, m2, None, None, 1e-5)
    graph.replay()
    torch.cuda.synchronize()
    for results in (aside, captured):
        assert all(map(torch.equal, results, want))
