"""BasicBlock and Bottleneck against torchvision's: training, inference, frozen norms, layouts, dtypes, edge cases."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
from cases import BLOCKS, BlockCase
from helpers import (
    EPS,
    LAYOUTS,
    assert_close,
    assert_no_worse,
    assert_same_buffers,
    assert_same_step,
    block_input,
    build,
    dtype_id,
    error,
    is_channels_last,
    pair,
    rand,
    randn,
    randomise,
    step,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused
from resnet_fused.blocks.paths import recording

EXACT = 1e-10
IDENTITY, PROJECTION = BLOCKS[4], BLOCKS[6]
BASIC = BLOCKS[1]
every_case = pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.id)
some_cases = pytest.mark.parametrize("case", [BLOCKS[0], BASIC, IDENTITY, PROJECTION], ids=lambda case: case.id)


def paths_of(block: nn.Module, x: Tensor) -> list[tuple[str, str | None]]:
    """Path and reason's code of every call that one forward makes."""
    with recording() as calls:
        block(x)
    return [(call.path, call.reason and call.reason.code) for call in calls]


def norms_of(block: nn.Module) -> list[nn.Module]:
    return [m for m in block.modules() if hasattr(m, "running_mean")]


def assert_same_training(
    fused: nn.Module, plain: nn.Module, x: Tensor, steps: int = 1, tolerance: float = EXACT
) -> None:
    """Outputs, gradients, parameters and buffers over several steps of SGD; the fused path was taken."""
    assert [path for path, _ in paths_of(copy.deepcopy(fused), x)] == ["train"]
    optimizers = [torch.optim.SGD(block.parameters(), lr=1e-3, momentum=0.9) for block in (fused, plain)]
    for i in range(steps):
        assert_same_step(*(step(block, x + 0.1 * i) for block in (fused, plain)), tolerance)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_buffers(fused, plain, tolerance)
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, tolerance, name)


def assert_same_inference(fused: nn.Module, plain: nn.Module, x: Tensor, path: str = "infer") -> None:
    fused.eval()
    plain.eval()
    before = copy.deepcopy(fused.state_dict())
    with torch.no_grad():
        assert [found for found, _ in paths_of(fused, x)] == [path]
        assert_close(fused(x), plain(x), EXACT)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())


# --- the two blocks are torchvision's ---------------------------------------------------------------------------------


@every_case
def test_training(case):
    assert_same_training(*pair(case), block_input(case), steps=3)


@every_case
def test_inference(case):
    assert_same_inference(*pair(case), block_input(case))


@every_case
def test_frozen_with_gradients(case):
    """eval() with gradients wanted: the same as torchvision's, and nothing is written."""
    fused, plain = pair(case)
    assert_same_training(fused.eval(), plain.eval(), block_input(case), steps=2)


@some_cases
def test_state_and_initialisation_are_torchvisions(case):
    blocks = []
    for package in (resnet_fused, resnet):
        torch.manual_seed(3)
        blocks.append(build(case, package))
    ours, theirs = (block.state_dict() for block in blocks)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert repr(blocks[0]) == repr(blocks[1])
    assert blocks[0].expansion == blocks[1].expansion
    assert blocks[0].stride == blocks[1].stride


@pytest.mark.parametrize("options", [{"groups": 2}, {"base_width": 32}, {"dilation": 2}], ids=str)
def test_basic_refuses_what_torchvisions_refuses(options):
    for package in (resnet_fused, resnet):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            package.BasicBlock(4, 4, **options)
        assert caught.type is (NotImplementedError if "dilation" in options else ValueError)


@some_cases
def test_zero_initialised_gamma(case):
    """With gamma 0 at the end the block is relu(shortcut), and that norm's weight still gets its gradient."""
    fused, plain = pair(case)
    for block in (fused, plain):
        nn.init.zeros_((block.bn3 if case.kind == "bottleneck" else block.bn2).weight)
    x = block_input(case)
    assert_same_training(fused, plain, x, steps=2)
    assert (fused.bn3 if case.kind == "bottleneck" else fused.bn2).weight.grad.any()


def test_copies_and_pickles_after_use():
    fused, plain = pair(IDENTITY)
    x = block_input(IDENTITY)
    with torch.no_grad():
        fused.eval()(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same_inference(other, plain, x)
        with torch.no_grad():
            other.conv1.weight.mul_(2)
            assert error(other(x), fused(x)) > 1e-3


# --- frozen norms -----------------------------------------------------------------------------------------------------


@some_cases
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_norms_in_eval_inside_a_training_block(case, which):
    fused, plain = pair(case)
    for block in (fused, plain):
        norms = norms_of(block)
        for norm in {"all": norms, "first": norms[:1], "last": norms[-1:]}[which]:
            norm.eval()
    assert_same_training(fused, plain, block_input(case), steps=2)


@some_cases
@pytest.mark.parametrize("what", ["norms", "weights", "everything"])
def test_parameters_without_gradient(case, what):
    fused, plain = pair(case)
    for block in (fused, plain):
        for module in block.modules():
            if what == "everything" or isinstance(module, nn.BatchNorm2d if what == "norms" else nn.Conv2d):
                for p in module.parameters(recurse=False):
                    p.requires_grad_(False)
    assert_same_step(step(fused, block_input(case)), step(plain, block_input(case)), EXACT)
    assert_same_buffers(fused, plain, EXACT)


@some_cases
def test_frozen_batch_norm(case):
    """torchvision's FrozenBatchNorm2d: buffers in place of parameters, the same in train() and eval()."""
    fused, plain = pair(case, FrozenBatchNorm2d)
    x = block_input(case)
    assert_same_training(fused, plain, x, steps=2)
    assert_same_inference(fused, plain, x)


def test_frozen_batch_norm_takes_one_value_per_channel():
    fused, plain = pair(BLOCKS[0], FrozenBatchNorm2d)
    x = randn(1, 5, 1, 1)
    assert_same_step(step(fused, x), step(plain, x), EXACT)


NORM_LAYERS = {
    "momentum-none": lambda channels: nn.BatchNorm2d(channels, momentum=None),
    "momentum-1": lambda channels: nn.BatchNorm2d(channels, momentum=1.0),
    "momentum-0": lambda channels: nn.BatchNorm2d(channels, momentum=0.0),
    "untracked": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "not-affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "eps": lambda channels: nn.BatchNorm2d(channels, eps=0.1),
    "bare": lambda channels: nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
    "sync": nn.SyncBatchNorm,
}


@pytest.mark.parametrize("layer", NORM_LAYERS)
@pytest.mark.parametrize("case", [BASIC, PROJECTION], ids=lambda case: case.id)
def test_norm_options(layer, case):
    """Training and then inference; without running statistics inference takes the batch's."""
    fused, plain = pair(case, NORM_LAYERS[layer])
    x = block_input(case)
    assert_same_training(fused, plain, x, steps=3)
    assert_same_inference(fused, plain, x, "train" if layer in ("untracked", "bare") else "infer")


def toggle_off(norm):
    norm.track_running_stats = False


def drop_statistics(norm):
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def drop_counter(norm):
    norm.num_batches_tracked = None


@pytest.mark.parametrize("change", [toggle_off, drop_statistics, drop_counter], ids=lambda f: f.__name__)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_toggled_after_construction(change, momentum):
    fused, plain = pair(PROJECTION)
    for block in (fused, plain):
        for norm in norms_of(block):
            norm.momentum = momentum
            change(norm)
    x = block_input(PROJECTION)
    assert_same_training(fused, plain, x, steps=2)
    assert_same_inference(fused, plain, x, "train" if change is drop_statistics else "infer")


def test_bias_free_batch_norm():
    fused, plain = pair(PROJECTION)
    for block in (fused, plain):
        for norm in norms_of(block):
            norm.bias = None
    assert_same_training(fused, plain, block_input(PROJECTION))
    assert_same_inference(fused, plain, block_input(PROJECTION))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_running_statistics_move_without_gradients(context):
    """A forward in train() to recompute the statistics, as after weight averaging."""
    fused, plain = pair(PROJECTION)
    x = block_input(PROJECTION)
    with context():
        assert_close(fused(x), plain(x), EXACT)
    assert_same_buffers(fused, plain, EXACT)
    assert_same_training(fused, plain, x)


def test_counters_keep_their_type_and_identity():
    fused, _ = pair(PROJECTION)
    buffers = dict(fused.named_buffers())
    step(fused, block_input(PROJECTION))
    assert all(buffer is buffers[name] for name, buffer in fused.named_buffers())
    assert fused.bn1.num_batches_tracked.tolist() == 1


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dout_layout", ["nchw", "sliced", "expanded", "scalar"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [BLOCKS[0], PROJECTION], ids=lambda case: case.id)
def test_layouts(case, layout, dout_layout):
    """Inputs and incoming gradients of any strides; values as torchvision's."""
    fused, plain = pair(case)
    found = []
    for block in (fused, plain):
        x = LAYOUTS[layout](block_input(case)).requires_grad_()
        out = block(x)
        dout = randn(*out.shape, seed=9)
        dout = torch.ones(()).double().expand_as(out) if dout_layout == "scalar" else LAYOUTS[dout_layout](dout)
        out.backward(dout)
        found.append({"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    assert_same_step(*found, EXACT)
    with torch.no_grad():
        x = LAYOUTS[layout](block_input(case))
        assert_close(fused.eval()(x), plain.eval()(x), EXACT)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("weights", ["nchw", "channels_last"])
@pytest.mark.parametrize("inputs", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize("size", [(6, 5), (1, 1)], ids=["image", "pixel"])
@some_cases
def test_memory_format_of_the_output_is_pytorchs(case, inputs, weights, training, size):
    strides = []
    for block in pair(case, dtype=torch.float32):
        if weights == "channels_last":
            block.to(memory_format=torch.channels_last)
        x = LAYOUTS[inputs](randn(4, case.inplanes, *size, dtype=torch.float32))
        with torch.no_grad():
            strides.append(block.train(training)(x))
    ours, theirs = strides
    assert is_channels_last(ours) == is_channels_last(theirs)
    assert ours.is_contiguous() == theirs.is_contiguous()


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [BASIC, IDENTITY, PROJECTION], ids=lambda case: case.id)
def test_one_value_per_channel(case):
    """PyTorch's error and text, before any running statistic moves."""
    fused, plain = pair(case)
    x = randn(1, case.inplanes, 1, 1)
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ValueError) as theirs:
        plain(x)
    with pytest.raises(ValueError) as ours:
        fused(x)
    assert str(ours.value) == str(theirs.value)
    assert "Expected more than 1 value per channel when training, got input size" in str(ours.value)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())
    assert_same_inference(fused, plain, x)


def test_one_value_per_channel_behind_the_stride_alone():
    """The first norm sees four values, the second one: PyTorch raises at the second, and so do we."""
    fused, plain = pair(PROJECTION)
    for block in (fused, plain):
        with pytest.raises(ValueError, match=r"got input size torch.Size\(\[1, 3, 1, 1\]\)"):
            block(randn(1, 6, 2, 2))
    assert fused.bn1.num_batches_tracked == 0


def test_one_value_per_channel_without_running_statistics_in_eval():
    """Without running statistics eval() takes the batch's, and PyTorch refuses one value there too."""
    fused, plain = pair(BLOCKS[0], NORM_LAYERS["untracked"])
    for block in (fused.eval(), plain.eval()):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            block(randn(1, 5, 1, 1))


@some_cases
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(case, training):
    """Works; running statistics stay, counters count, gradients are zeros: what torchvision's block does."""
    found, blocks = [], pair(case)
    before = copy.deepcopy(blocks[0].state_dict())
    for block in blocks:
        found.append(step(block.train(training), block_input(case)[:0]))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert ours["out"].shape == theirs["out"].shape
    assert all(not gradient.any() for gradient in ours.values())
    for name, value in blocks[0].state_dict().items():
        expected = before[name] + (1 if "num_batches" in name and training else 0)
        assert torch.equal(value, expected), name


def test_wrong_inputs_raise_pytorchs_errors():
    fused, plain = pair(BLOCKS[0])
    for x in (randn(2, 4, 5, 5), randn(2, 5, 5), torch.ones(2, 5, 4, 4, dtype=torch.int64), randn(2, 5, 4, 4).float()):
        errors = []
        for block in (fused, plain):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                block(x)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


@some_cases
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nan_propagates(case, training):
    """One NaN in, the same NaNs out; in training it spoils statistics and gradients, as in PyTorch."""
    fused, plain = pair(case)
    x = block_input(case)
    x[1, 0, 2, 2] = float("nan")
    ours, theirs = (step(block.train(training), x) for block in (fused, plain))
    assert theirs["out"].isnan().any()
    for name, exact in theirs.items():
        torch.testing.assert_close(
            ours[name], exact, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    for (name, buffer), exact in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, exact, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x), equal_nan=True)


def test_large_mean():
    """A batch whose mean is 1e4 deviations away, in fp32: no worse than PyTorch."""
    fused, plain = pair(BLOCKS[0], dtype=torch.float32)
    for block in (fused, plain):
        nn.init.dirac_(block.conv1.weight)
    exact = copy.deepcopy(plain).double()
    x = (block_input(BLOCKS[0]) + 1e4).float()
    with torch.no_grad():
        outs = [block(t) for block, t in ((fused, x), (plain, x), (exact, x.double()))]
    assert_no_worse(*outs, floor=1e-5)
    assert_no_worse(fused.bn1.running_var, plain.bn1.running_var, exact.bn1.running_var, floor=1e-5)


# --- dtypes -----------------------------------------------------------------------------------------------------------

FLOOR = {torch.float32: 2e-6, torch.float16: 2 * EPS[torch.float16], torch.bfloat16: 2 * EPS[torch.bfloat16]}
WIDE = BlockCase("bottleneck", 32, 8, 1, "identity", {}, (8, 8), "identity")
WIDE_PROJECTION = BlockCase("basic", 16, 24, 2, "projection", {}, (9, 9), "projection")
wide = pytest.mark.parametrize("case", [WIDE, WIDE_PROJECTION], ids=lambda case: case.id)


def gentle(block: nn.Module) -> nn.Module:
    """Norms near their initial values, so that no error is amplified."""
    for i, norm in enumerate(norms_of(block)):
        with torch.no_grad():
            norm.weight.copy_(rand(norm.weight.numel(), seed=i))
            norm.bias.copy_(randn(norm.bias.numel(), seed=i) * 0.2)
    return block


def compare_dtypes(fused, plain, x, floor, autocast=None, training=True):
    """Output and gradients: dtypes as PyTorch's, errors against fp64 at most twice PyTorch's plus the floor."""
    exact = copy.deepcopy(plain).double()
    exact_step = step(exact.train(training), x.double())
    with autocast or torch.autocast("cpu", enabled=False):
        ours, theirs = (step(block.train(training), x) for block in (fused, plain))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_no_worse(ours[name], value, exact_step[name], floor, name)
    for (name, buffer), other, truth in zip(fused.named_buffers(), plain.buffers(), exact.buffers(), strict=True):
        assert_no_worse(buffer, other, truth, floor, name)
    fused.eval()
    plain.eval()
    with torch.no_grad(), autocast or torch.autocast("cpu", enabled=False):
        outs = fused(x), plain(x)
    with torch.no_grad():
        assert_no_worse(*outs, exact.eval()(x.double()), floor, "inference")


@wide
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_dtypes(case, dtype, training):
    fused, plain = (gentle(block).to(dtype) for block in pair(case, dtype=dtype))
    compare_dtypes(fused, plain, block_input(case, 4, dtype=dtype), FLOOR[dtype], training=training)


@wide
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_half_model_with_float_norms(case, dtype):
    fused, plain = (gentle(block).to(dtype) for block in pair(case, dtype=dtype))
    for block in (fused, plain):
        for norm in norms_of(block):
            norm.float()
    compare_dtypes(fused, plain, block_input(case, 4, dtype=dtype), FLOOR[dtype])


@wide
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast(case, dtype, x_dtype):
    """Input in fp32 or in autocast's dtype; the output's dtype and every gradient's are PyTorch's."""
    if dtype == torch.float16 and x_dtype == torch.bfloat16:
        pytest.skip("PyTorch itself refuses to mix the two half types")
    fused, plain = (gentle(block) for block in pair(case, dtype=torch.float32))
    x = block_input(case, 4, dtype=x_dtype)
    compare_dtypes(fused, plain, x, FLOOR[dtype], torch.autocast("cpu", dtype))


@wide
def test_autocast_disabled_inside_autocast(case):
    fused, plain = (gentle(block) for block in pair(case, dtype=torch.float32))
    x = block_input(case, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        ours, theirs = step(fused, x), step(plain, x)
    assert ours["out"].dtype == theirs["out"].dtype == torch.float32
    assert_same_step(ours, theirs, 1e-4)


def test_autocast_around_forward_alone():
    """backward outside the context, and a forward in eval inside it with gradients wanted."""
    fused, plain = (gentle(block) for block in pair(WIDE, dtype=torch.float32))
    for training in (True, False):
        found = []
        for block in (fused, plain):
            block.zero_grad()
            x = block_input(WIDE, 4, dtype=torch.float32).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                out = block.train(training)(x)
            out.float().square().sum().backward()
            found.append({"x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
        ours, theirs = found
        for name, other in theirs.items():
            assert ours[name].dtype == other.dtype == torch.float32
            assert error(ours[name], other) < 0.1, name


def test_fp64_input_is_not_touched_by_autocast():
    fused, plain = pair(BLOCKS[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(step(fused, block_input(BLOCKS[0])), step(plain, block_input(BLOCKS[0])), EXACT)


# --- inference's folded parameters ------------------------------------------------------------------------------------


def scale_in_place(block):
    with torch.no_grad():
        block.conv2.weight.mul_(1.5)


def scale_norm(block):
    with torch.no_grad():
        block.bn1.weight.add_(0.3)


def move_statistics(block):
    block.bn2.running_mean.add_(0.5)


def load(block):
    block.load_state_dict({key: value * 1.25 for key, value in block.state_dict().items()})


def replace_parameter(block):
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach() * 2)


def replace_buffer(block):
    block.bn1.running_var = block.bn1.running_var * 2


def change_eps(block):
    block.bn1.eps = 0.5


def change_stride(block):
    """Same weights, other geometry."""
    block.conv2.stride = (1, 1)
    block.conv1.stride = (2, 2)


def change_dilation(block):
    block.conv2.dilation = block.conv2.padding = (2, 2)


def swap_norm(block):
    norm = nn.BatchNorm2d(block.bn1.num_features).double()
    norm.eval()
    block.bn1 = norm


def data_swap(block):
    block.conv1.weight.data = block.conv1.weight.data * 3
    block.eval()


def data_write(block):
    block.conv1.weight.data.mul_(3)
    block.eval()


CHANGES = [
    scale_in_place, scale_norm, move_statistics, load, replace_parameter, replace_buffer, change_eps, change_stride,
    change_dilation, swap_norm, data_swap, data_write,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_inference_follows_every_change(change):
    """What is folded and kept is made anew when something it was made from changes."""
    fused, plain = (block.eval() for block in pair(PROJECTION))
    x = block_input(PROJECTION)
    with torch.no_grad():
        before = fused(x).clone()
        assert torch.equal(fused(x), before)
        for block in (fused, plain):
            change(block)
        assert_close(fused(x), plain(x), EXACT)
        assert error(plain(x), before) > 1e-3


def test_inference_follows_training_and_the_optimizer():
    fused, plain = pair(PROJECTION)
    x = block_input(PROJECTION)
    for _ in range(2):
        assert_same_inference(fused, plain, x)
        fused.train()
        plain.train()
        assert_same_training(fused, plain, x)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_inference_follows_an_optimizer_without_train(options):
    """Fused optimizers write parameters without giving them a new version."""
    fused, plain = (block.eval() for block in pair(PROJECTION))
    x = block_input(PROJECTION)
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1, **options) for block in (fused, plain)]
    for _ in range(2):
        with torch.no_grad():
            assert_close(fused(x), plain(x), EXACT)
        for block, optimizer in zip((fused, plain), optimizers, strict=True):
            for p in block.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    with torch.no_grad():
        assert_close(fused(x), plain(x), EXACT)


def test_inference_follows_statistics_that_pytorchs_batch_norm_moved():
    fused, plain = (block.eval() for block in pair(PROJECTION))
    x = block_input(PROJECTION)
    with torch.no_grad():
        fused(x)
        for norm in (*norms_of(fused), *norms_of(plain)):
            norm.train()
        with resnet_fused.disabled():
            fused(x)
        plain(x)
        for norm in (*norms_of(fused), *norms_of(plain)):
            norm.eval()
        assert_close(fused(x), plain(x), EXACT)


def test_functional_call():
    """Other tensors in the parameters' place, in training and inference, and the module's own afterwards."""
    fused, plain = pair(PROJECTION)
    x = block_input(PROJECTION)
    state = {name: value * 1.5 for name, value in plain.state_dict().items() if value.is_floating_point()}
    for training in (True, False):
        with torch.no_grad():
            own = [block.train(training)(x) for block in (fused, plain)]
            ours, theirs = (
                functional_call(block, {key: value.clone() for key, value in state.items()}, (x,))
                for block in (fused, plain)
            )
            assert_close(ours, theirs, EXACT)
            assert error(ours, own[0]) > 1e-3
            assert_close(fused(x), plain(x), EXACT)


@pytest.mark.parametrize("make_inside", [False, True], ids=["model-outside", "model-inside"])
def test_inference_mode(make_inside):
    """Inside inference mode, then outside it with gradients; also a model whose parameters are inference tensors."""
    x = block_input(PROJECTION)
    with torch.inference_mode(make_inside):
        fused, plain = pair(PROJECTION)
    fused.eval()
    plain.eval()
    with torch.inference_mode():
        assert_close(fused(x), plain(x), EXACT)
        scale_in_place(fused)
        scale_in_place(plain)
        assert_close(fused(x), plain(x), EXACT)
    if not make_inside:
        assert_same_step(step(fused, x), step(plain, x), EXACT)


def test_inference_of_many_sizes():
    fused, plain = (block.eval() for block in pair(PROJECTION))
    with torch.no_grad():
        for _ in range(2):
            for n, size in ((1, 5), (2, 5), (2, 8), (3, 3), (1, 9), (2, 1)):
                x = randn(n, PROJECTION.inplanes, size, size + 1, seed=size)
                assert_close(fused(x), plain(x), EXACT)


def test_inference_gives_the_same_bits_twice_and_leaves_its_input_alone():
    for case in (BLOCKS[0], IDENTITY, PROJECTION):
        fused = pair(case, dtype=torch.float32)[0].eval()
        for layout in ("nchw", "channels_last"):
            x = LAYOUTS[layout](block_input(case, dtype=torch.float32))
            kept = x.clone()
            with torch.no_grad():
                first = fused(x)
                value = first.clone()
                assert torch.equal(fused(x), value)
            assert torch.equal(first, value)
            assert torch.equal(x, kept)


# --- what is not fused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda c: nn.GroupNorm(1, c), "GroupNorm"),
        (lambda c: nn.InstanceNorm2d(c, affine=True), "InstanceNorm2d"),
        (lambda c: nn.Identity(), "Identity"),
        (type("MyNorm", (nn.BatchNorm2d,), {"forward": lambda self, x: 2 * x}), "MyNorm"),
    ],
    ids=["group", "instance", "identity", "subclass"],
)
def test_other_norms_run_the_original_and_say_so(layer, name, caplog):
    case = IDENTITY
    torch.manual_seed(0)
    plain = build(case, resnet, layer).double()
    fused = build(case, resnet_fused, layer).double()
    fused.load_state_dict(plain.state_dict())
    with caplog.at_level(logging.INFO, logger="resnet_fused"):
        assert paths_of(fused, block_input(case)) == [("original", "norm")]
    x = block_input(case)
    assert_same_step(step(fused, x), step(plain, x), 0.0)
    (row,) = resnet_fused.explain(fused, x).steps
    assert (row.path, row.reason) == ("original", "norm")
    assert name in row.detail
    (row,) = resnet_fused.report(fused).declined
    assert name in row.detail


def test_disabled():
    fused, plain = pair(BASIC)
    x = block_input(BASIC)
    with resnet_fused.disabled():
        assert paths_of(copy.deepcopy(fused), x) == [("original", "disabled")]
        assert_same_step(step(fused, x), step(plain, x), 0.0)
    assert paths_of(fused, x) == [("train", None)]


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, i, out: seen.append(1)),
    "forward-pre": lambda m, seen: m.register_forward_pre_hook(lambda m, i: seen.append(1)),
    "full-backward": lambda m, seen: m.register_full_backward_hook(lambda m, i, o: seen.append(1)),
    "full-backward-pre": lambda m, seen: m.register_full_backward_pre_hook(lambda m, o: seen.append(1)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["conv1", "bn2", "relu", "downsample", "downsample.1"])
def test_hooks_on_inner_modules_run(kind, name):
    """Registered after the block has run fused, and gone again when removed."""
    fused, plain = pair(PROJECTION)
    x = block_input(PROJECTION)
    assert paths_of(copy.deepcopy(fused), x) == [("train", None)]
    step(fused, x)
    step(plain, x)
    counts = []
    for block in (fused, plain):
        seen: list[int] = []
        module = block.get_submodule(name)
        block.relu.inplace = False  # backward hooks refuse what is written to in place
        handle = HOOKS[kind](module, seen)
        step(block, x)
        counts.append(len(seen))
        handle.remove()
    assert counts[0] == counts[1] > 0
    assert paths_of(fused, x) == [("train", None)]


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_the_block_itself_stay_fused(kind):
    fused, _ = pair(PROJECTION)
    seen: list[int] = []
    HOOKS[kind](fused, seen)
    x = block_input(PROJECTION)
    assert paths_of(copy.deepcopy(fused), x) == [("train", None)]
    seen.clear()
    step(fused, x)
    assert seen == [1]


def test_gradient_hooks_on_parameters_and_input_run():
    fused, _ = pair(PROJECTION)
    seen = []
    fused.conv2.weight.register_hook(lambda g: seen.append("weight") or 2 * g)
    fused.bn1.bias.register_post_accumulate_grad_hook(lambda p: seen.append("bias"))
    expected = step(pair(PROJECTION)[1], block_input(PROJECTION))
    found = step(fused, block_input(PROJECTION))
    assert sorted(seen) == ["bias", "weight"]
    assert_close(found["conv2.weight"], 2 * expected["conv2.weight"], EXACT)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_convolutions_with_bias(mode):
    """The norm behind takes it out of batches; the running mean has it, and frozen statistics give it a gradient."""
    blocks = pair(PROJECTION)
    for block in blocks:
        torch.manual_seed(1)
        width = block.conv2.in_channels
        block.conv2 = nn.Conv2d(width, width, 3, block.conv2.stride, 1).double()
        block.downsample[0].bias = nn.Parameter(randn(block.downsample[0].out_channels, seed=3))
        block.train(mode == "train")
    fused, plain = blocks
    x = block_input(PROJECTION)
    if mode == "eval":
        with torch.no_grad():
            assert paths_of(fused, x) == [("infer", None)]
            assert_close(fused(x), plain(x), EXACT)
        return
    assert paths_of(fused, x) == [("train", None)]
    plain(x)
    ours, theirs = step(fused, x), step(plain, x)
    if mode == "train":  # 0 but for PyTorch's rounding
        for name in ("conv2.bias", "downsample.0.bias"):
            assert ours.pop(name).abs().max() == 0
            assert theirs.pop(name).abs().max() < 1e-12
    assert_same_step(ours, theirs, EXACT)
    assert_same_buffers(fused, plain, EXACT)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "old-weight_norm", "prune"])
def test_parametrized_convolutions(how):
    """What computes the weight at each call still does."""
    blocks = pair(PROJECTION)
    for block in blocks:
        torch.manual_seed(1)
        if how == "prune":
            prune.l1_unstructured(block.conv2, "weight", 0.5)
        elif how == "old-weight_norm":
            torch.nn.utils.weight_norm(block.conv2)
        else:
            getattr(parametrizations, how)(block.conv2)
    fused, plain = blocks
    x = block_input(PROJECTION)
    ((path, _),) = paths_of(fused, x)
    plain(x)
    assert path == "original"
    assert_same_step(step(fused, x), step(plain, x), EXACT)
    assert_same_buffers(fused, plain, EXACT)
    if how == "prune":
        for block in blocks:
            prune.remove(block.conv2, "weight")
        assert_same_training(fused, plain, x)


@pytest.mark.parametrize("what", ["activation", "padding", "kernel", "grouped-1x1", "padding-mode"])
def test_other_modules_run_the_original(what):
    """A module put in after construction: the block computes what its modules say."""
    blocks = pair(IDENTITY)
    for block in blocks:
        torch.manual_seed(1)
        width = block.conv2.in_channels
        if what == "activation":
            block.relu = nn.SiLU()
        elif what == "grouped-1x1":
            block.conv1 = nn.Conv2d(8, width, 1, groups=2, bias=False).double()
        else:
            options = {
                "padding": {"padding": 1, "kernel_size": 3, "padding_mode": "zeros", "dilation": 1},
                "padding-mode": {"padding": 1, "padding_mode": "reflect"},
                "kernel": {"kernel_size": 5, "padding": 2},
            }[what]
            options = {"kernel_size": 3, "bias": False} | options
            block.conv2 = nn.Conv2d(width, width, **options).double()
        if what == "padding":
            block.conv2.padding, block.conv1.padding, block.conv3.padding = (0, 0), (1, 1), (0, 0)
    fused, plain = blocks
    x = block_input(IDENTITY)
    assert [path for path, _ in paths_of(copy.deepcopy(fused), x)] == ["original"]
    assert_same_step(step(fused, x), step(plain, x), EXACT)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "subclass"])
def test_transforms_run_the_original(transform):
    fused, plain = (block.eval() for block in pair(BASIC))
    x, v = block_input(BASIC), randn(*block_input(BASIC).shape, seed=11)
    if transform == "vmap":
        found = [torch.func.vmap(block)(torch.stack([x, v])) for block in (fused, plain)]
    elif transform == "grad":
        found = [torch.func.grad(lambda t, block=block: block(t).sum())(x) for block in (fused, plain)]
    elif transform == "jvp":
        found = [torch.func.jvp(block, (x,), (v,))[1] for block in (fused, plain)]
    else:
        subclass = type("Image", (Tensor,), {})
        found = [block(x.as_subclass(subclass)) for block in (fused, plain)]
        assert type(found[0]) is type(found[1])
    assert_close(found[0], found[1], EXACT)


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    fused, plain = pair(PROJECTION)
    found = []
    for block in (fused, plain):
        x = block_input(PROJECTION).requires_grad_()
        out = checkpoint(block, x, use_reentrant=False)
        out.backward(randn(*out.shape, seed=9))
        found.append({"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    assert_same_step(*found, EXACT)  # how often the running statistics move depends on where the recomputation stops


def test_training_gives_the_same_bits_twice():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = block_input(PROJECTION, dtype=dtype)
        runs = [step(pair(PROJECTION, dtype=dtype)[0], x) for _ in range(2)]
        assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_shortcut_of_identities():
    """timm pads its shortcuts with nn.Identity."""
    fused, plain = pair(PROJECTION)
    for block in (fused, plain):
        block.downsample = nn.Sequential(nn.Identity(), *block.downsample)
    assert_same_training(fused, plain, block_input(PROJECTION))
    fused, plain = pair(BLOCKS[0])
    for block in (fused, plain):
        block.downsample = nn.Identity()
    assert_same_training(fused, plain, block_input(BLOCKS[0]))


def test_shortcut_that_broadcasts():
    fused, plain = pair(BLOCKS[0])
    x = block_input(BLOCKS[0])
    for block in (fused, plain):
        block.downsample = nn.AdaptiveAvgPool2d(1)
    assert_same_training(fused, plain, x)
    with torch.no_grad():
        assert_close(fused.eval()(x), plain.eval()(x), EXACT)


def test_identity_that_broadcasts_or_does_not_fit_is_pytorchs():
    fused, plain = resnet_fused.BasicBlock(1, 8).double(), resnet.BasicBlock(1, 8).double()
    plain.load_state_dict(fused.state_dict())
    x = randn(2, 1, 6, 6)
    assert_close(fused(x), plain(x), EXACT)
    with pytest.raises(RuntimeError, match="size of tensor"):
        resnet_fused.BasicBlock(4, 8).double()(randn(2, 4, 6, 6))


def test_in_place_shortcut_is_declined():
    fused, plain = pair(BLOCKS[0])
    x = block_input(BLOCKS[0])
    for block in (fused, plain):
        block.downsample = nn.ReLU(inplace=True)
    with torch.no_grad():
        assert_close(fused.eval()(x.clone()), plain.eval()(x.clone()), EXACT)
    assert [s.reason for s in resnet_fused.explain(fused.eval(), x.clone().requires_grad_(False)).steps] == ["in-place"]


def test_weights_that_are_plain_attributes():
    fused, plain = (block.eval() for block in pair(BLOCKS[0]))
    x = block_input(BLOCKS[0])
    first, second = (randn(*fused.conv1.weight.shape, seed=seed) for seed in (21, 22))
    for block in (fused, plain):
        del block.conv1.weight
    with torch.no_grad():
        for weight in (first, second):
            for block in (fused, plain):
                block.conv1.weight = weight
            assert_close(fused(x), plain(x), EXACT)
        second.mul_(2)
        assert_close(fused(x), plain(x), EXACT)
    for block in (fused, plain):
        block.requires_grad_(False)
        block.conv1.weight = (first * 2).requires_grad_()
        assert block(x).requires_grad


def test_refresh_after_an_uncounted_write():
    fused, plain = (block.eval() for block in pair(BLOCKS[0]))
    x = block_input(BLOCKS[0])
    with torch.no_grad():
        fused(x)
        for block in (fused, plain):
            block.conv1.weight.data.mul_(3)
        resnet_fused.refresh(fused)
        assert_close(fused(x), plain(x), EXACT)


def test_infinite_running_variance_stays_infinite():
    fused, plain = pair(BLOCKS[0])
    for block in (fused, plain):
        block.bn1.running_var[0] = float("inf")
        block(block_input(BLOCKS[0]))
    assert fused.bn1.running_var[0] == plain.bn1.running_var[0] == float("inf")


def test_fp64_input_with_fp32_weights_under_autocast_raises_pytorchs_error():
    fused, plain = pair(BLOCKS[0], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for block in (plain, fused):
            with pytest.raises(RuntimeError, match=r"Double|double|Float|type"):
                block(block_input(BLOCKS[0]))


# --- synchronised batch norm ------------------------------------------------------------------------------------------

SPLITS = {"even": [3, 3], "uneven": [4, 2], "single": [5, 1], "empty": [6, 0]}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def batch_block(case: BlockCase) -> nn.Module:
    torch.manual_seed(0)
    return randomise(build(case, resnet_fused)).double()


def synchronise(block: nn.Module) -> nn.Module:
    """In place, after DistributedDataParallel, which refuses to wrap SyncBatchNorm on the CPU."""
    for norm in norms_of(block):
        norm.__class__, norm.process_group = nn.SyncBatchNorm, None
    return block


def sync_worker(rank: int, port: int, folder: str) -> None:
    """Steps on this rank's share of the batch; what came out goes to a file."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for case in (IDENTITY, BASIC):
        x = block_input(case, 6)
        for name, split in SPLITS.items():
            block = synchronise(batch_block(case))
            with recording() as calls:
                result = step(block, x.split(split)[rank], split_dout(block, case, split, rank))
            assert [call.path for call in calls] == ["train"]
            found[case.kind, name] = result, dict(block.named_buffers())
        parallel = nn.parallel.DistributedDataParallel(batch_block(case))
        synchronise(parallel.module)
        out = parallel(x.split([3, 3])[rank])
        out.backward(2 * split_dout(parallel.module, case, [3, 3], rank))  # DDP takes the mean over ranks
        gradients = {name: p.grad for name, p in parallel.module.named_parameters()}
        found[case.kind, "ddp"] = {"out": out.detach()} | gradients, dict(parallel.module.named_buffers())
    tiny = BlockCase("basic", 3, 3, 1, "identity", {}, (1, 1), "one pixel")
    found["one value on each rank"] = step(synchronise(batch_block(tiny)), block_input(tiny, 2).split([1, 1])[rank])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def split_dout(block: nn.Module, case: BlockCase, split: list[int], rank: int) -> Tensor:
    channels = case.planes * block.expansion
    size = [-(-s // case.stride) for s in case.size]
    return randn(sum(split), channels, *size, seed=9).split(split)[rank]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("sync")
    torch.multiprocessing.spawn(sync_worker, (free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("split", [*SPLITS, "ddp"])
@pytest.mark.parametrize("case", [IDENTITY, BASIC], ids=lambda case: case.id)
def test_sync_batch_norm_is_one_batch(ranks, case, split):
    """Two ranks with a share each give what torchvision's block gives for the whole batch in one process."""
    torch.manual_seed(0)
    whole = randomise(build(case, resnet)).double()
    exact = step(whole, block_input(case, 6))
    results = [found[case.kind, split] for found in ranks]
    for name, expected in exact.items():
        parts = [result[name] for result, _ in results if name in result]
        if not parts:
            assert (split, name) == ("ddp", "x")
        elif name in ("out", "x"):
            assert_close(torch.cat(parts), expected, EXACT, name)
        elif split == "ddp":
            assert torch.equal(*parts)
            assert_close(parts[0], expected, 1e-9, name)
        else:
            assert_close(sum(parts), expected, 1e-9, name)
    for _, buffers in results:
        for name, expected in whole.named_buffers():
            assert_close(buffers[name], expected, EXACT, name)


def test_sync_batch_norm_takes_one_value_from_each_rank(ranks):
    """PyTorch refuses one value per channel of the whole batch alone."""
    case = BlockCase("basic", 3, 3, 1, "identity", {}, (1, 1), "one pixel")
    torch.manual_seed(0)
    exact = step(
        randomise(build(case, resnet)).double(), block_input(case, 2), randn(1, 3, 1, 1, seed=9).repeat(2, 1, 1, 1)
    )
    assert_close(torch.cat([found["one value on each rank"]["out"] for found in ranks]), exact["out"], EXACT)
