"""What the 3x3 convolutions in CUDA C++ decline, refuse, and take from tables."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cuda_helpers import CASES, LARGER, emulate, supported
from harness import kernels
from kernel_helpers import DEVICE, maker
from test_ops import ABSENT, DIRECTIONS, Maker, samples

from resnet_fused import backends, extension, tuning, use_backend
from resnet_fused.cuda import conv3x3
from resnet_fused.ops._op import ops as registered
from resnet_fused.tuning import ConvConfig, measure, tables
from resnet_fused.tuning.calls import Call
from resnet_fused.tuning.configs import label
from resnet_fused.tuning.problems import convolution

pytestmark = pytest.mark.usefixtures("cuda_kernels")

SIZES = {
    "type": "fp16", "images": 2, "height": 6, "width": 5, "channels": 16, "filters": 24,
    "stride": 1, "dilation": 1, "groups": 2, "device": 0,
}  # fmt: skip
FPROP = {"deferred": True, "bias": True, "residual": True, "relu": True, "statistics": True, "config": None}
DGRAD = {
    "sign": "values", "factor": True, "partner": True, "deferred": True, "sums": True, "skip": True,
    "skip_sign": "bits", "keep_dy": True, "config": None,
}  # fmt: skip
WGRAD = {"sign": "bits", "factor": True, "partner": True, "deferred": True, "out": "fp32", "config": None}


# --- what they decline ------------------------------------------------------------------------------------------------


def declined(op: str, args: tuple) -> str:
    reason = backends.unavailable(op, "cuda", *args)
    assert reason is not None
    with pytest.raises(NotImplementedError) as caught, backends.use_backend("cuda"):
        registered[op](*args)
    assert reason in str(caught.value)
    return reason


def test_what_is_declined_is_told():
    m, case = maker(torch.float16), CASES[0]
    x, *_, w, _, _, _, _ = args = samples("conv3x3_fprop", m, case)[0]
    geometry = (1, 1, 1, True)
    assert declined("conv3x3_fprop", (x, *ABSENT, w, 4, 1, 1, True)) == (
        "conv3x3: expected stride to be between 1 and 3, got 4"
    )
    assert declined("conv3x3_fprop", (x.double(), *ABSENT, w.double(), *geometry)) == (
        "the kernel is written for float32, float16 and bfloat16, not torch.float64"
    )
    assert declined("conv3x3_fprop", (x[:0], *ABSENT, w, *geometry)) == "a tensor is empty"
    assert "PReLU" in declined("conv3x3_fprop", samples("conv3x3_fprop", m, case)[3])
    assert "PReLU" in declined("conv3x3_infer", samples("conv3x3_infer", m, case)[5])
    dz, *rest = samples("conv3x3_wgrad", m, case)[0]
    assert declined("conv3x3_wgrad", (dz.float(), *rest)) == (
        "the kernel reads activations of one dtype, not torch.float16 and torch.float32"
    )
    assert declined("conv3x3_wgrad", (dz, *rest[:-1], torch.float64)) == (
        "the kernel writes float32, float16 and bfloat16, not torch.float64"
    )
    far = (x, *ABSENT, w, 1, 2**30, 1, True)
    assert "to be counted in 31 bits, a dilation's reach included" in declined("conv3x3_fprop", far)
    assert backends.unavailable("conv3x3_fprop", "cuda", *args) is None


def test_where_kernels_are_missing_or_elsewhere(monkeypatch):
    x, *rest = samples("conv3x3_fprop", Maker(torch.float16), CASES[0])[0]
    assert "meta" in conv3x3._fprop_unsupported(x.to("meta"), *rest)
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "reason", "it was not built")
    assert conv3x3._fprop_unsupported(x, *rest) == "it was not built"


@pytest.mark.skipif(DEVICE != "cpu", reason="the extension's own module is in place")
def test_the_extension_declines_tensors_of_the_cpu(monkeypatch):
    monkeypatch.undo()
    if extension.module is None:
        pytest.skip(str(extension.reason))
    for op in (f"conv3x3_{direction}" for direction in DIRECTIONS):
        args = samples(op, Maker(torch.float16), CASES[0])[0]
        assert backends.unavailable(op, "cuda", *args) == (
            "the kernel reads one CUDA device only, and an argument is on cpu"
        )


def test_no_kernel_is_a_default_yet():
    for direction in DIRECTIONS:
        assert not backends.implementations(f"conv3x3_{direction}")["cuda"].default


# --- the choice without a measurement ---------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulated device is any device")
@pytest.mark.parametrize(
    ("capability", "changed", "first"),
    [
        (80, {}, ("portable", 128, 64, "halo")),
        (80, {"filters": 128}, ("portable", 128, 128, "halo")),
        (80, {"filters": 192}, ("portable", 128, 64, "halo")),  # 128 columns would multiply 256
        (80, {"filters": 128, "type": "fp32"}, ("portable", 128, 64, "halo")),
        (80, {"stride": 2}, ("portable", 128, 64, "im2col")),
        (80, {"width": 2000}, ("portable", 128, 64, "im2col")),  # no halo of two rows fits
        (80, {"channels": 128, "filters": 128, "groups": 32}, ("portable", 128, 64, "halo")),  # fewest zeros
        (90, {"type": "fp32"}, ("portable", 128, 64, "halo")),
        (90, {"channels": 60}, ("portable", 128, 64, "halo")),
    ],
)
def test_the_rule(capability, changed, first, cuda_kernels):
    emulate(capability=capability, multiprocessors=108)
    sizes = {**SIZES, "images": 32, "height": 28, "width": 28, "channels": 64, "filters": 64, "groups": 1}
    problem = cuda_kernels.Conv3x3(**{**sizes, **changed})
    launcher = problem.fprop(deferred=True, bias=False, residual=False, relu=False, statistics=True, config=None)
    assert launcher.config == launcher.configs[0] == first


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulated device is any device")
def test_hopper_s_instructions_come_first_where_there_are_any(cuda_kernels):
    emulate(capability=90, multiprocessors=132)
    problem = cuda_kernels.Conv3x3(**{**SIZES, "groups": 1})
    for direction, forms in (("fprop", FPROP), ("dgrad", DGRAD), ("wgrad", WGRAD)):
        chips = [chip for chip, *_ in getattr(problem, direction)(**forms).configs]
        assert chips == sorted(chips), "hopper, then portable"
        assert set(chips) == {"hopper", "portable"}


def test_a_row_of_the_benchmarks_names_the_configurations_of_its_launches(cuda_kernels):
    launches = {"conv3x3_fprop": 1, "conv3x3_infer": 1, "conv3x3_dgrad": 1, "conv3x3_wgrad": 1, "conv3x3_bprop": 2}
    cases = {case.op: case for case in kernels.smoke() if case.op in launches}
    assert cases.keys() == launches.keys()
    for op, case in cases.items():
        args = kernels.realise(op, case.args, torch.device(DEVICE))
        with use_backend("cuda"):
            backend, *labels = kernels.chosen(op, args).split(", ")
        assert backend == "cuda"
        assert len(labels) == launches[op]
        if op != "conv3x3_bprop":
            assert labels == [label(conv3x3.candidates(op, *args)[0])]


# --- tables -----------------------------------------------------------------------------------------------------------


def table(op: str, args: tuple, backend: str, config: ConvConfig | None) -> tables.Table:
    entry = tables.Entry(op, convolution(op, *args)._asdict(), backend, config, {backend: 1.0})
    return tables.Table({}, [entry])


def test_a_table_s_configuration_is_taken_where_it_can_run():
    op = "conv3x3_fprop"
    args = supported(op, maker(torch.float16), LARGER[0])[0]
    first, *_, last = conv3x3.candidates(op, *args)

    def taken() -> tuple:
        return conv3x3._launcher(op, args).config

    assert taken() == dataclasses.astuple(first)[:4]
    with tuning.measured(table(op, args, "cuda", last)):
        assert taken() == dataclasses.astuple(last)[:4]
        with tuning.use(op, first):
            assert taken() == dataclasses.astuple(first)[:4]
    with tuning.measured(table(op, args, "cuda", ConvConfig("portable", 100, 3, "halo"))):
        assert taken() == dataclasses.astuple(first)[:4]


def test_a_table_that_has_another_backend_ahead_is_followed():
    op = "conv3x3_fprop"
    args = supported(op, maker(torch.float16), LARGER[0])[0]
    preferred = backends.implementations(op)["cuda"].preferred
    assert preferred(*args)
    for backend in ("triton", "aten"):
        with tuning.measured(table(op, args, backend, None)):
            assert not preferred(*args)
            assert preferred(args[0][:1], *args[1:-1], False)
    with tuning.measured(table(op, args, "cuda", conv3x3.candidates(op, *args)[0])):
        assert preferred(*args)
        assert backends.implementations(op)["triton"].preferred(*args), "it comes after cuda, and before what cuda beat"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_tuner_measures_every_configuration(direction):
    """All of them beside the other backends; the fastest gets the entry."""
    op = f"conv3x3_{direction}"
    args = supported(op, maker(torch.float16), CASES[0]._replace(c=8, k=8))[0]
    (problem,) = measure.problems([Call(op, args)])
    offered = () if direction == "bprop" else conv3x3.candidates(op, *args)
    names = [label(config) for config in offered] or ["cuda"]
    told: list[str] = []

    def timer(runs: dict) -> dict[str, float]:
        assert set(runs) == {*names, "aten", "materialised"}
        return {name: 1.0 if name == names[-1] else 2.0 for name in runs}

    entry = measure.measure(problem, torch.device(DEVICE), timer, told.append)
    assert not told
    assert (entry.backend, entry.config) == ("cuda", offered[-1] if offered else None)
    assert measure.unknown(entry) is None


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"type": "fp8"}, "type to be one of fp16, bf16, fp32, tf32, got fp8"),
        *(
            ({name: value}, f"{name} to be between 1 and 2147483647, got {value}")
            for name in ("images", "height", "width", "channels", "filters", "dilation", "groups")
            for value in (0, -1, 2**31)
        ),
        ({"stride": 0}, "stride to be between 1 and 3, got 0"),
        ({"stride": 4}, "stride to be between 1 and 3, got 4"),
        ({"channels": 15}, "channels to be a multiple of groups, got 15"),
        ({"filters": 25}, "filters to be a multiple of groups, got 25"),
        ({"device": -1}, "device to be the index of a CUDA device, got -1"),
        (
            {"images": 2**11, "height": 2**10, "width": 2**10},
            "images * height * width to be counted in 31 bits, a dilation's reach included, got 2048 * 1024 * 1024",
        ),
        (
            {"dilation": 2**28},
            "images * height * width to be counted in 31 bits, a dilation's reach included, got 2 * 6 * 5",
        ),
        (
            {"channels": 2**15, "filters": 2**15},
            "filters * 9 * channels / groups to be at most 2147483647, got 32768 * 9 * 16384",
        ),
    ],
)
def test_sizes_that_do_not_fit_throw(changed, text, cuda_kernels):
    with pytest.raises(ValueError) as caught:
        cuda_kernels.Conv3x3(**{**SIZES, **changed})
    assert str(caught.value) == f"conv3x3: expected {text}"


@pytest.mark.parametrize(
    ("direction", "changed", "text"),
    [
        (
            "fprop",
            {"config": ("portable", 7, 64, "im2col")},
            "config to be one that runs the problem, got (portable, 7, 64, im2col)",
        ),
        ("dgrad", {"sign": "yes"}, "sign to be one of none, bits, values, got yes"),
        ("dgrad", {"factor": False}, "factor to be True with partner, got False"),
        ("dgrad", {"deferred": False}, "deferred to be True with sums, got False"),
        ("dgrad", {"skip": False}, "skip to be True with skip_sign, got False"),
        ("dgrad", {"sign": "none", "factor": False, "partner": False}, "keep_dy to be False where dy is dz, got True"),
        ("wgrad", {"out": "fp64"}, "out to be one of fp16, bf16, fp32, got fp64"),
    ],
)  # fmt: skip
def test_forms_that_make_no_sense_throw(direction, changed, text, cuda_kernels):
    forms = {"fprop": FPROP, "dgrad": DGRAD, "wgrad": WGRAD}[direction]
    with pytest.raises(ValueError) as caught:
        getattr(cuda_kernels.Conv3x3(**SIZES), direction)(**{**forms, **changed})
    assert str(caught.value) == f"conv3x3_{direction}: expected {text}"


RUNS = {
    "fprop": "x scale shift weight bias residual out count mean m2 workspace counters stream",
    "dgrad": "dz sign y a b c weight x scale shift mean rstd skip skip_sign skip_scale dx dbeta dgamma dy workspace"
    " counters stream",
    "wgrad": "dz sign y a b c x scale shift dw workspace stream",
}


@pytest.mark.parametrize("direction", RUNS)
def test_bad_addresses_throw_before_any_launch(direction, cuda_kernels):
    """Every address in turn is null, or one byte off; nothing is read, since nothing is there."""
    forms = {"fprop": FPROP, "dgrad": DGRAD, "wgrad": {**WGRAD, "out": "fp16"}}[direction]
    launcher = getattr(cuda_kernels.Conv3x3(**SIZES), direction)(**forms)
    names = RUNS[direction].split()
    good = dict.fromkeys(names, 4096) | {"stream": 0} | ({"skip_scale": 1.0} if direction == "dgrad" else {})
    for name in set(names) - {"stream", "skip_scale"}:
        with pytest.raises(ValueError) as caught:
            launcher.run(*{**good, name: 0}.values())
        assert str(caught.value) == f"conv3x3_{direction}: expected {name} to be a device pointer, got a null pointer"
        if name == "skip_sign" or (name, direction) == ("sign", "wgrad"):
            continue  # bits have any address
        with pytest.raises(ValueError, match=rf"expected {name} to be aligned to (4|16) bytes, got 4097"):
            launcher.run(*{**good, name: 4097}.values())


@pytest.mark.parametrize("direction", RUNS)
def test_addresses_that_no_problem_has_throw(direction, cuda_kernels):
    forms = {
        "fprop": dict.fromkeys(FPROP, False) | {"config": None},
        "dgrad": dict.fromkeys(DGRAD, False) | {"sign": "none", "skip_sign": "none", "config": None},
        "wgrad": dict.fromkeys(WGRAD, False) | {"sign": "none", "out": "fp16", "config": None},
    }[direction]
    launcher = getattr(cuda_kernels.Conv3x3(**SIZES), direction)(**forms)
    names = RUNS[direction].split()
    come = {"x", "weight", "out"} if direction == "fprop" else {"dz", "weight", "dx"} if direction == "dgrad" else set()
    come |= {"dz", "x", "dw", "workspace"} if direction == "wgrad" else set()
    good = {name: 4096 if name in come else 0 for name in names}
    for name in set(names) - come - {"stream", "skip_scale"}:
        with pytest.raises(ValueError) as caught:
            launcher.run(*{**good, name: 64}.values())
        expected = f"conv3x3_{direction}: expected {name} to be 0, since the problem has none, got 64"
        assert str(caught.value) == expected


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulated device is there to be shrunk")
def test_a_problem_that_no_configuration_runs_is_told(cuda_kernels):
    emulate(shared_limit=16 * 1024)
    args = samples("conv3x3_fprop", maker(torch.float16), CASES[0])[0]
    assert declined("conv3x3_fprop", args).startswith(
        "no configuration of the kernel runs Geometry(type='fp16', images=2"
    )
    launcher = cuda_kernels.Conv3x3(**SIZES).fprop(**FPROP)
    assert (launcher.configs, launcher.config, launcher.workspace) == ([], None, 0)
    with pytest.raises(
        ValueError, match="conv3x3_fprop: expected a problem that some configuration can run, got one that"
    ):
        launcher.run(*[4096] * 12, 0)


def test_reference_is_what_the_kernels_are_held_against():
    """The samples have all forms: every mask, every kind of gradient, each ending."""
    forms = {type(f): set() for f in (conv3x3.Fprop(False), conv3x3.Wgrad("none", False, False, False, "fp32"))}
    for op in ("conv3x3_fprop", "conv3x3_infer", "conv3x3_dgrad", "conv3x3_wgrad"):
        for args in supported(op, maker(torch.float16), CASES[0]):
            found = conv3x3._FORMS[op](*args)[1]
            forms.setdefault(type(found), set()).add(found)
    dgrad = forms[conv3x3.Dgrad]
    assert {f.sign for f in dgrad} == {f.sign for f in forms[conv3x3.Wgrad]} == {"none", "bits", "values"}
    assert {f.skip_sign for f in dgrad} == {"none", "bits", "values"}
    assert {(f.factor, f.partner) for f in dgrad} == {(False, False), (True, False), (True, True)}
    assert {(f.deferred, f.sums) for f in dgrad} == {(False, False), (True, False), (True, True)}
