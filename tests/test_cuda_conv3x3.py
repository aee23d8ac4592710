"""What the 3x3 convolutions in CUDA C++ compute, every form of them, and blocks that run in them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import ConvCase
from cuda_helpers import CASES, CHIPS, LARGER, compare, emulate, parts, run, supported, ways
from helpers import assert_close, assert_no_worse, dtype_id, error, randn
from kernel_helpers import DEVICE, maker
from test_kernels_blocks import FLOOR, block_channels, pair, step
from test_ops import ABSENT, DIRECTIONS, TOLERANCE, exact, flatten
from torch import Tensor

from resnet_fused import backends, disabled, use_backend
from resnet_fused.cuda import conv3x3

pytestmark = pytest.mark.usefixtures("cuda_kernels")
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}

# --- what the kernels compute -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_form(case, direction):
    for args in supported(f"conv3x3_{direction}", maker(torch.float16), case):
        compare(f"conv3x3_{direction}", args)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", LARGER, ids=lambda case: case.id)
def test_larger_shapes(case, direction):
    """The forms with most to do; ``bprop`` is made of the others."""
    forms = supported(f"conv3x3_{direction}", maker(torch.float16), case)
    for args in forms[-1:] if direction == "bprop" else forms[-1::-3]:
        compare(f"conv3x3_{direction}", args)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["bf16", "fp32", "tf32"])
def test_every_type(name, direction, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", name == "tf32")
    # PyTorch's error on the CPU is that of fp32, whatever it allows a GPU.
    floor = TOLERANCE[torch.float16] * (8 if DEVICE == "cpu" else 1) if name == "tf32" else None
    for case in (LARGER[0], LARGER[2]):
        compare(f"conv3x3_{direction}", supported(f"conv3x3_{direction}", maker(TYPES[name]), case)[-1], floor=floor)


def test_tf32_is_one_product_and_fp32_three(monkeypatch):
    args = supported("conv3x3_fprop", maker(torch.float32), LARGER[1])[0]
    truth, errors = exact("conv3x3_fprop", args)[0], []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        errors.append(error(run("conv3x3_fprop", args)[0], truth))
    assert errors[0] < 4e-6 < 1e-4 < errors[1] < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("case", [LARGER[0], LARGER[2], LARGER[7]], ids=lambda case: case.id)
def test_every_configuration(case, direction, dtype):
    op = f"conv3x3_{direction}"
    args = supported(op, maker(dtype), case)[-1]
    compare(op, args, every=True)
    if DEVICE == "cpu":
        offered = conv3x3.candidates(op, *args)
        assert {config.feed for config in offered} == {"halo", "im2col"}
        hopper = dtype == torch.float16 and case.groups == 1
        assert {config.chip for config in offered} == (set(CHIPS) if hopper else {"portable"})


@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_other_layouts_are_copied(direction, layout):
    op = f"conv3x3_{direction}"
    forms = supported(op, maker(torch.float16, layout), LARGER[2])
    for args in forms[:: max(1, len(forms) // 2)]:
        at = 4 if direction in ("fprop", "infer") else 6
        compare(op, (*args[:at], args[at].contiguous(), *args[at + 1 :]))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_addresses_that_are_not_aligned_are_copied(direction):
    """Channels that allow 16-byte accesses, in memory that does not."""
    op = f"conv3x3_{direction}"

    def shifted(a):
        if not isinstance(a, Tensor) or a.dim() != 4:
            return a
        memory = torch.empty(a.numel() + 1, dtype=a.dtype, device=a.device)
        return memory[1:].as_strided(a.shape, a.stride()).copy_(a)

    args = tuple(map(shifted, supported(op, maker(torch.float16), LARGER[0])[-1]))
    assert any(a.data_ptr() % 16 for a in args if isinstance(a, Tensor))
    compare(op, args)


def test_statistics_keep_the_variance_under_a_large_mean():
    """Mean 1e4 deviations from 0, where fp32 E[x^2] - E[x]^2 has no right digit."""
    x = (randn(6, 16, 16, 16, device=DEVICE) + 1e4).float()
    weight = torch.zeros(16, 16, 3, 3, device=DEVICE)
    weight[range(16), range(16), 1, 1] = 1
    args = x, *ABSENT, weight, 1, 1, 1, True
    for configs in ways("conv3x3_fprop", args):
        y, counts, mean, m2 = run("conv3x3_fprop", args, configs)
        assert counts.tolist() == [6 * 16 * 16]
        assert_close(mean[0], y.double().mean((0, 2, 3)), 1e-7)
        assert_close(m2[0] / counts, y.double().var((0, 2, 3), correction=0), 1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_reaches_what_it_reaches_in_the_reference(direction):
    op = f"conv3x3_{direction}"
    for args in supported(op, maker(torch.float32), LARGER[0]):
        first, is_weight = args[0].clone(), [direction == "wgrad"] if direction == "wgrad" else [False] * 4 + [True]
        first[0, 0, 0, 0] = math.nan
        expected = flatten(backends.implementations(op)["reference"].run(first, *args[1:]))
        for t, e, weight in zip(run(op, (first, *args[1:])), expected, is_weight):  # noqa: B905 (fprop has 1 or 4)
            # dy is multiplied with a padding of zeros: in the gradient of its filter a NaN reaches all taps.
            reached = e.isnan().any((1, 2, 3), keepdim=True).expand_as(e) if weight else e.isnan()
            assert bool((t.isnan() >= e.isnan()).all())
            assert bool((t.isnan() <= reached).all())


def test_the_gradient_that_dgrad_forms_is_read_by_wgrad(monkeypatch):
    """As if both had formed it: the same bits."""
    op = "conv3x3_bprop"
    for case in (LARGER[0], LARGER[2], LARGER[6], LARGER[7]):
        for args in supported(op, maker(torch.float16), case)[1:3]:
            found = run(op, args)
            dgrad, wgrad = parts(args)
            apart = *run("conv3x3_dgrad", dgrad), *run("conv3x3_wgrad", wgrad)
            assert all(torch.equal(a, b) for a, b in zip(found, apart, strict=True))
    built = conv3x3._built

    def unable(kernels, geometry, forms, config):
        return (
            dataclasses.replace(Unable())
            if getattr(forms, "keep_dy", False)
            else built(kernels, geometry, forms, config)
        )

    monkeypatch.setattr(conv3x3, "_built", unable)
    assert all(torch.equal(a, b) for a, b in zip(run(op, args), apart, strict=True))
    monkeypatch.undo()


@dataclasses.dataclass
class Unable:
    """A problem that no configuration runs."""

    configs: tuple = ()


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.skipif(DEVICE != "cpu", reason="the order of an emulator's threads is chosen, a GPU's is not")
def test_neither_order_nor_delay_changes_a_bit(direction):
    op = f"conv3x3_{direction}"
    for dtype in (torch.float16, torch.float32):
        args = supported(op, maker(dtype), LARGER[0])[-1]
        for capability in (80, 90):
            emulate(capability=capability)
            first = run(op, args)
            for seed in (2, 3):
                emulate(capability=capability, seed=seed, lazy=seed == 3)
                assert all(torch.equal(a, b) for a, b in zip(run(op, args), first, strict=True)), (dtype, seed)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has the memory that it has")
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_devices_with_less_shared_memory_and_one_multiprocessor(direction):
    op = f"conv3x3_{direction}"
    emulate(capability=86, shared_limit=99 * 1024, multiprocessors=1)
    for dtype in (torch.float16, torch.float32):
        compare(op, supported(op, maker(dtype), LARGER[0])[-1], every=True)


def test_counters_are_left_at_zero_and_nothing_is_written_beyond_the_results(cuda_kernels):
    """Memory around what the kernel writes keeps its bits."""
    c, k = 24, 72
    problem = cuda_kernels.Conv3x3(
        type="fp16", images=2, height=13, width=11, channels=c, filters=k, stride=1, dilation=1, groups=1, device=0
    )
    x, w = (
        randn(2, 13, 11, c, dtype=torch.float16, device=DEVICE),
        randn(k, 3, 3, c, dtype=torch.float16, device=DEVICE),
    )
    fprop = problem.fprop(deferred=False, bias=False, residual=False, relu=False, statistics=True, config=None)
    sizes = {"out": 2 * 2 * 13 * 11 * k, "count": 4, "mean": 4 * k, "m2": 4 * k, "workspace": fprop.workspace}
    sizes["counters"] = 4 * fprop.counters
    guard = 256
    held = {
        name: torch.full((size + 2 * guard,), 0x5A, dtype=torch.uint8, device=DEVICE) for name, size in sizes.items()
    }
    held["counters"][guard:-guard] = 0
    at = {name: memory[guard:].data_ptr() for name, memory in held.items()}
    stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
    written = [at[name] for name in ("out", "count", "mean", "m2", "workspace", "counters")]
    fprop.run(x.data_ptr(), 0, 0, w.data_ptr(), 0, 0, *written, stream)
    for name, memory in held.items():
        assert bool((memory[:guard] == 0x5A).all()), name
        assert bool((memory[-guard:] == 0x5A).all()), name
    assert not held["counters"][guard:-guard].any()
    found = held["out"][guard:-guard].view(torch.float16).view(2, 13, 11, k).permute(0, 3, 1, 2)
    assert_close(found, torch.conv2d(x.permute(0, 3, 1, 2).double(), w.permute(0, 3, 1, 2).double(), padding=1), 1e-2)


def test_many_addresses_keep_their_tensor_maps_apart():
    """More tensors than a problem's cache of maps holds, each read twice."""
    op, weight = "conv3x3_fprop", maker(torch.bfloat16).weight(LARGER[10])
    inputs = [maker(torch.bfloat16, seed=i).activation(5, 40, 1, 1) for i in range(100)]
    found = [run(op, (x, *ABSENT, weight, 1, 1, 1, False))[0] for x in (*inputs, *inputs)]
    for x, y, again in zip(inputs, found[:100], found[100:], strict=True):
        assert torch.equal(y, again)
        assert_close(y, torch.conv2d(x.double(), weight.double(), padding=1), TOLERANCE[torch.bfloat16])


# --- on a GPU ---------------------------------------------------------------------------------------------------------

NETWORK = (
    #        R  N   C    H   W   K    s  d  g
    ConvCase(3, 16, 64, 56, 56, 64, 1, 1, 1, "resnet50 layer1"),
    ConvCase(3, 16, 128, 56, 56, 128, 2, 1, 1, "resnet50 layer2.0"),
    ConvCase(3, 16, 256, 14, 14, 256, 1, 1, 1, "resnet50 layer3"),
    ConvCase(3, 16, 512, 7, 7, 512, 1, 1, 1, "resnet50 layer4"),
    ConvCase(3, 8, 256, 28, 28, 256, 1, 1, 32, "resnext50 layer2"),
    ConvCase(3, 4, 512, 28, 28, 512, 1, 2, 1, "dilated layer4 of a segmentation network"),
)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("case", NETWORK, ids=lambda case: case.id)
def test_shapes_of_networks_in_every_configuration(case, name, direction):
    op = f"conv3x3_{direction}"
    compare(op, supported(op, maker(TYPES[name]), case)[-1], every=True)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_in_a_cuda_graph_and_on_a_side_stream(direction):
    op = f"conv3x3_{direction}"
    args = supported(op, maker(torch.bfloat16), NETWORK[2])[-1]
    want = run(op, args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = run(op, args)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, args)
    for _ in range(2):  # counters are at zero again after a replay
        graph.replay()
    torch.cuda.synchronize()
    for results in (aside, captured):
        assert all(map(torch.equal, results, want))


# --- whole blocks -----------------------------------------------------------------------------------------------------


OTHERS = "cuda,aten"  # what has no kernel in CUDA runs in PyTorch


@pytest.fixture
def ran(monkeypatch):
    """How often each op ran in the extension, by name."""
    times = dict.fromkeys((f"conv3x3_{direction}" for direction in DIRECTIONS), 0)
    for op in times:
        implementation = backends.implementations(op)["cuda"]

        def counted(*args, op=op, run=implementation.run):
            times[op] += 1
            return run(*args)

        monkeypatch.setitem(backends.implementations(op), "cuda", dataclasses.replace(implementation, run=counted))
    return times


@pytest.fixture(params=CHIPS)
def chip(request):
    """Whose kernels run: a GPU's own, the emulated ones of both."""
    if DEVICE == "cpu":
        emulate(capability=80 if request.param == "portable" else 90)
    elif request.param == "portable":
        pytest.skip("the GPU's own kernels run")


IN_BLOCKS = ("basic", "basic projection", "bottleneck", "bottleneck groups", "full pre-activation")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("name", IN_BLOCKS)
def test_training_step(name, dtype, chip, ran):
    block, truth = pair(name, dtype)
    stock, x = pair(name, dtype)[0], randn(3, block_channels(name), 6, 7, seed=5, dtype=dtype, device=DEVICE)
    with use_backend(OTHERS):
        ours = step(block, x)
    assert ran["conv3x3_fprop"] == ran["conv3x3_bprop"] == (2 if "basic" in name else 1)
    with disabled():
        theirs, expected = step(stock, x), step(truth, x.double())
    for what, value in expected.items():
        assert_no_worse(ours[what], theirs[what], value, FLOOR[dtype], what)


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_inference(name, chip, ran):
    block, truth = pair(name, torch.float16)
    block.eval(), truth.eval()
    x = randn(2, block_channels(name), 5, 6, seed=5, dtype=torch.float16, device=DEVICE)
    with torch.no_grad():
        with use_backend(OTHERS):
            ours = block(x)
        with disabled():
            theirs, expected = block(x), truth(x.double())
    assert ran["conv3x3_infer"] == (2 if "basic" in name else 1)
    assert_no_worse(ours, theirs, expected, FLOOR[torch.float16])
