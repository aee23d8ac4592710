"""``fuse(model, memory=...)``: with "recompute" and "projections" the bits of "save", from fewer saved tensors."""

from __future__ import annotations

import copy
import io
import os
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from block_helpers import assert_same_training
from cases import BLOCKS
from ecosystem import TOLERANCE
from functorch.compile import make_boxed_func
from helpers import assert_no_worse, assert_same_buffers, assert_same_step, block_input, dtype_id, pair, randn, step
from kernel_helpers import DEVICE
from networks import tiny
from parity import assert_same, formula_of, run_block, run_formula, state_of
from test_blocks_sync import batch_block, free_port, split_dout, synchronise
from test_kernels_blocks import FLOOR, block_channels
from test_kernels_blocks import pair as kernel_pair
from test_kernels_blocks import step as kernel_step
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint
from units import (
    KINDS,
    MODES,
    ONE_OF_EACH,
    RULES,
    SHORTCUTS,
    UNITS,
    WIDTHS,
    build_prelu,
    build_unit,
    prelu_input,
    set_mode,
    unit_input,
)

import resnet_fused
from resnet_fused import backends, fuse
from resnet_fused.ops._conv import ConvOps
from resnet_fused.ops.bn_add_relu import packed_masks

BASIC_IDENTITY, BASIC_PROJECTION = BLOCKS[:2]
IDENTITY, PROJECTION = BLOCKS[4], BLOCKS[6]
both_kinds = pytest.mark.parametrize("kind", KINDS)
every_unit = pytest.mark.parametrize("unit", UNITS)
blocks = pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.id)
few_blocks = pytest.mark.parametrize(
    "case", [BASIC_IDENTITY, BASIC_PROJECTION, IDENTITY, PROJECTION], ids=lambda case: case.id
)


less_memory = pytest.mark.parametrize("memory", ["projections", "recompute"])


def twins(block: nn.Module, memory: str = "recompute", **options: object) -> tuple[nn.Module, nn.Module]:
    """``block`` as it recomputes, and as it saves."""
    found = [fuse(copy.deepcopy(block), memory=kept, **options) for kept in (memory, "save")]
    return found[0], found[1]


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str = "result") -> None:
    assert ours.keys() == theirs.keys(), what
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, f"{what}: {name}"
        assert torch.equal(ours[name], value), f"{what}: {name}"


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, weakref.ref]]:
    """The kernel size and the output (weakly) of every forward convolution from now on."""
    seen: list[tuple[int, weakref.ref]] = []
    fprop = ConvOps.fprop

    def watched(self, *args, statistics):
        assert not (statistics and torch._C._current_graph_task_id() != -1)  # none are taken in backward
        y, tiles = fprop(self, *args, statistics=statistics)
        seen.append((self.kernel, weakref.ref(y)))
        return y, tiles

    monkeypatch.setattr(ConvOps, "fprop", watched)
    return seen


# --- the same gradients -----------------------------------------------------------------------------------------------


@blocks
@less_memory
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_blocks_have_the_same_bits(case, memory, dtype, backend):
    ours, theirs = twins(pair(case, dtype=dtype)[0], memory, backend=backend)
    x = block_input(case, dtype=dtype)
    assert_same_bits(step(ours, x), step(theirs, x))
    assert_same_bits(dict(ours.named_buffers()), dict(theirs.named_buffers()), "buffers")


@blocks
def test_blocks_train_as_torchvisions(case):
    """Steps of SGD in fp64: outputs, gradients, parameters and running statistics."""
    fused, plain = pair(case)
    assert_same_training(fuse(fused, memory="recompute"), plain, block_input(case), 2)


@both_kinds
@every_unit
@less_memory
def test_units_have_the_same_bits(kind, unit, memory):
    """Every shortcut and rule, with norms in training, in eval and mixed."""
    for case in (*SHORTCUTS, *RULES, *(WIDTHS if kind == "bottleneck" else ())):
        for mode in MODES:
            ours, theirs = twins(set_mode(build_unit(kind, unit, case), mode), memory)
            x = unit_input(case)
            assert_same_bits(run_block(ours, x), run_block(theirs, x), f"{case.why}, {mode}")


@every_unit
def test_units_compute_their_formulas(unit):
    for case in ONE_OF_EACH:
        block, x = build_unit("bottleneck", unit, case), unit_input(case)
        exact = run_formula(formula_of(block, case), state_of(block), x)
        assert_same(run_block(fuse(block, memory="recompute"), x), exact, what=case.why)


@pytest.mark.parametrize("slopes", [1, 4], ids=["one-slope", "slopes"])
@pytest.mark.parametrize("final", [True, False], ids=["final", "linear"])
def test_prelu_blocks_have_the_same_bits(slopes, final):
    for mode in MODES:
        ours, theirs = twins(set_mode(build_prelu(True, slopes, final), mode))
        assert_same_bits(run_block(ours, prelu_input()), run_block(theirs, prelu_input()), mode)


@pytest.mark.parametrize("unit", ["original", "relu_before_add", "full_preact"])
@both_kinds
def test_gradients_exactly_where_asked(kind, unit):
    """One tensor alone, and all but one."""
    case = SHORTCUTS[2]
    names = ["x", *(name for name, _ in build_unit(kind, unit, case).named_parameters())]
    for mode in ("train", "frozen", "odd-frozen", "even-frozen"):
        pairs = twins(set_mode(build_unit(kind, unit, case), mode))
        for name in names:
            for alone in (True, False):
                found = []
                for block in pairs:
                    for other, p in block.named_parameters():
                        p.requires_grad_((other == name) == alone)
                    found.append(run_block(copy.deepcopy(block), unit_input(case), need_dx=(name == "x") == alone))
                assert_same_bits(*found, f"{mode}: {'' if alone else 'all but '}{name}")


@few_blocks
def test_one_bit_masks_have_the_same_bits(case):
    """As on a GPU: the masked gradient is pending where the outputs come back."""
    with packed_masks():
        results = [step(block, block_input(case)) for block in twins(pair(case)[0])]
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("name", ["basic projection", "bottleneck projection", "relu before add", "prelu"])
def test_triton(name, dtype):
    """Another configuration may round elsewhere, so not bits: at most twice PyTorch's error against fp64."""
    block, exact = kernel_pair(name, dtype)
    x = randn(3, block_channels(name), 6, 7, seed=5, dtype=dtype, device=DEVICE)
    with resnet_fused.disabled():
        theirs, truth = kernel_step(copy.deepcopy(block), x), kernel_step(exact, x.double())
    with packed_masks():
        ours = kernel_step(fuse(block, backend="triton", memory="recompute"), x)
    for what, value in truth.items():
        assert_no_worse(ours[what], theirs[what], value, FLOOR[dtype], what)


@few_blocks
def test_autocast(case):
    """Convolutions of the second time cast their weights as those of the first."""
    found = []
    for block in twins(pair(case, dtype=torch.float32)[0]):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(block, block_input(case, dtype=torch.float32)))
    assert_same_bits(*found)
    assert found[0]["out"].dtype == torch.bfloat16


@few_blocks
def test_backward_under_another_autocast_and_backend(case, monkeypatch):
    """What holds at the forward holds for what is recomputed, whatever is in force at the backward."""
    chosen = []
    choose = backends.choose
    found = []
    for block in twins(pair(case, dtype=torch.float32)[0]):
        x = block_input(case, dtype=torch.float32).requires_grad_()
        with backends.use_backend("reference"):
            out = block(x)
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16), backends.use_backend("aten"):
            patch.setattr(backends, "choose", lambda *a: chosen.append((a[0], choose(*a).backend)) or choose(*a))
            out.backward(torch.ones_like(out))
        found.append({"x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    assert_same_bits(*found)
    assert {backend for _, backend in chosen} == {"reference"}
    assert any(op.endswith("fprop") for op, _ in chosen)


@few_blocks
def test_running_statistics_may_move_between_forward_and_backward(case):
    """The second time reads the statistics of the first."""
    results = []
    for block in twins(pair(case)[0]):
        x = block_input(case).requires_grad_()
        out = block(x)
        block(block_input(case, seed=6))
        out.sum().backward()
        results.append({"x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    assert_same_bits(*results)


def test_backward_twice():
    block = fuse(pair(PROJECTION)[0], memory="recompute")
    x = block_input(PROJECTION).requires_grad_()
    out = block(x).square().sum()
    tensors = [x, *block.parameters()]
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, tensors)))


# --- what is saved, and what is computed again ------------------------------------------------------------------------


@few_blocks
@less_memory
def test_what_the_sum_read_is_freed(case, memory, convolutions):
    """After forward the outputs of the projection, and of the last convolution, are gone, those before are not."""
    chain, projected = 2 if case.kind == "basic" else 3, case.shortcut == "projection"
    last = [3 if case.kind == "basic" else 1]
    gone = {"projections": [], "recompute": last}[memory] + [1] * projected
    for block, again in zip(twins(pair(case)[0], memory), (gone, []), strict=True):
        out = block(block_input(case).requires_grad_())
        outputs = [ref for _, ref in convolutions]
        assert len(outputs) == chain + projected
        kept = len(outputs) - len(again)
        assert [ref() is not None for ref in outputs] == [i < kept for i in range(len(outputs))]
        convolutions.clear()
        out.sum().backward()
        assert [kernel for kernel, _ in convolutions] == again
        convolutions.clear()


@pytest.mark.parametrize(
    ("unit", "rule", "mode", "asked", "expected"),
    [
        ("original", "sum", "train", "all", 2),
        ("original", "sum", "frozen", "x", 0),  # dy is a multiple of dz: a frozen backbone
        ("original", "sum", "frozen", "bn3.weight", 1),  # its sums alone
        ("original", "sum", "frozen", "downsample.1.bias", 1),
        ("original", "sum", "train", "conv1.weight", 1),  # nothing behind the projection wants a gradient
        ("original", "sum", "train", "downsample.0.weight", 1),
        ("original", "sum", "train", "bn3.bias", 1),
        ("original", "exclusive", "frozen", "x", 2),  # the gate's gradient reads both
        ("bn_after_add", "sum", "train", "all", 1),  # the branch has no norm of its own
        ("relu_before_add", "sum", "frozen", "x", 2),  # the ReLU in front of the sum reads its input
        ("full_preact", "sum", "train", "all", 1),
    ],
)
def test_only_what_backward_reads_is_saved_or_computed_again(unit, rule, mode, asked, expected, convolutions):
    """Of the last convolution and the projection of a bottleneck."""
    case = next(c for c in (*SHORTCUTS, *RULES) if c.shortcut == "projection" and c.rule[0] == rule)
    for block, saved, again in zip(
        twins(set_mode(build_unit("bottleneck", unit, case), mode)), (0, expected), (expected, 0), strict=True
    ):
        for name, p in block.named_parameters():
            p.requires_grad_(asked in ("all", name))
        out = block(unit_input(case).requires_grad_(asked in ("all", "x")))
        assert sum(ref() is not None for _, ref in convolutions[-2:]) == saved
        convolutions.clear()
        out.sum().backward()
        assert len(convolutions) == again
        convolutions.clear()


@less_memory
def test_gates_of_the_branch_recompute_nothing(memory, convolutions):
    case = next(case for case in RULES if case.rule == ("squeeze",))
    block = fuse(build_unit("basic", "original", case), memory=memory)
    out = block(unit_input(case))
    convolutions.clear()
    out.sum().backward()
    assert not convolutions
    assert resnet_fused.report(block).rows[0].memory == "save"


# --- with autograd's own tools ----------------------------------------------------------------------------------------


@few_blocks
def test_second_derivatives_are_pytorchs(case):
    found = []
    for block in pair(case):
        block = fuse(block, memory="recompute") if isinstance(block, resnet_fused.convert.FUSED) else block
        x = block_input(case).requires_grad_()
        out = block(x)
        (dx,) = torch.autograd.grad(out, x, randn(*out.shape, seed=9), create_graph=True)
        dx.square().sum().backward()
        found.append({"x": x.grad} | {name: p.grad for name, p in block.named_parameters() if p.grad is not None})
    assert_same_step(*({n: g for n, g in f.items() if found[1][n].abs().max() > 1e-8} for f in found), 1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
@few_blocks
def test_checkpointing(case, reentrant):
    fused, plain = pair(case)
    block = fuse(fused, memory="recompute")
    x = block_input(case).requires_grad_()
    out = checkpoint(block, x, use_reentrant=reentrant)
    out.backward(randn(*out.shape, seed=9))
    found = {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}
    assert_same_step(found, step(plain, block_input(case)), TOLERANCE)


@pytest.fixture
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("case", [BASIC_PROJECTION, IDENTITY], ids=lambda case: case.id)
def test_compile(case):
    """One graph with the same numbers; backward computes again what it should, and heeds the next ``fuse``."""
    fused, plain = pair(case)
    exact, x, again = step(plain, block_input(case)), block_input(case), []

    def backward(graph, inputs):
        again.append(graph.code.count("_fprop.default"))
        return make_boxed_func(graph)

    compiler = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=backward)
    compiled = torch.compile(fused, backend=compiler, fullgraph=True)
    for memory in ("recompute", "save"):
        fuse(fused, memory=memory)
        found = {name.removeprefix("_orig_mod."): t for name, t in step(compiled, x).items()}
        assert_same_step(found, exact, TOLERANCE)
    assert again == [2 if case.shortcut == "projection" else 1, 0]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_inductor(mode):
    case = SHORTCUTS[2]
    block, x = set_mode(build_unit("bottleneck", "original", case), mode), unit_input(case)
    exact = run_formula(formula_of(block, case), state_of(block), x)
    found = run_block(torch.compile(fuse(block, memory="recompute"), fullgraph=True), x)
    assert_same({name.replace("_orig_mod.", ""): t for name, t in found.items()}, exact)


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.load(saved(m), weights_only=False)],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_recompute(how, convolutions):
    model = fuse(tiny(), memory="recompute")
    other = how(model)
    assert [row.memory for row in resnet_fused.report(other).rows] == ["save", *["recompute"] * 3]
    out = other(randn(2, 3, 32, 32))
    convolutions.clear()
    out.sum().backward()
    assert len(convolutions) == 5  # three blocks, two of them with a projection
    assert_same_bits(step(other, randn(2, 3, 32, 32)), step(model, randn(2, 3, 32, 32)))


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@both_kinds
def test_whole_models_train_as_torchvisions(kind):
    plain = tiny(kind)
    fused = fuse(copy.deepcopy(plain), memory="recompute")
    x = randn(2, 3, 32, 32)
    assert_same_step(step(fused, x), step(plain, x), TOLERANCE)
    assert_same_buffers(fused, plain, TOLERANCE)


# --- synchronised batch norm ------------------------------------------------------------------------------------------


def worker(rank: int, port: int, folder: str) -> None:
    """A step of each memory on this rank's share, and how many collectives it took."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    calls: list[str] = []
    for name in ("all_gather_into_tensor", "all_reduce"):
        real = getattr(dist, name)
        setattr(dist, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
    found = {}
    for case in (IDENTITY, BASIC_PROJECTION):
        for memory in ("recompute", "save"):
            block = fuse(synchronise(batch_block(case)), memory=memory)
            x = block_input(case, 6).split([4, 2])[rank]
            result = step(block, x, split_dout(block, case, [4, 2], rank))
            found[case.kind, memory] = result, dict(block.named_buffers()), list(calls)
            calls.clear()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sync_batch_norm(tmp_path):
    """Each rank has the bits of "save", after as many collectives."""
    torch.multiprocessing.spawn(worker, (free_port(), str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for kind in KINDS:
            ours, theirs = (found[kind, memory] for memory in ("recompute", "save"))
            assert_same_bits(ours[0], theirs[0])
            assert_same_bits(ours[1], theirs[1])
            assert ours[2] == theirs[2]
            assert set(ours[2]) == {"all_gather_into_tensor", "all_reduce"}
