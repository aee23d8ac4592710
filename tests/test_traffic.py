"""The byte counter against counts by hand, op by op, and against the table of docs/architecture.md."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import resnet_fused
from resnet_fused import traffic
from resnet_fused.ops._op import observed, ops
from resnet_fused.ops.bn_add_relu import packed_masks
from resnet_fused.traffic import Traffic

N, C, H, W, K = 4, 16, 6, 8, 32
X, Y = 2 * N * C * H * W, 2 * N * K * H * W  # bytes of input and output in bf16
W1, W3 = 2 * K * C, 2 * 9 * K * C  # bytes of the weights
FLOPS1 = 2 * (N * H * W) * K * C


def image(channels: int = C, height: int = H, width: int = W, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    t = torch.empty(N, channels, height, width, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last)


def weight(kernel: int = 1, groups: int = 1) -> torch.Tensor:
    return torch.empty(K, C // groups, kernel, kernel, dtype=torch.bfloat16, device="meta")


def vector(channels: int = C) -> torch.Tensor:
    return torch.empty(channels, device="meta")


def mask(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.numel() // 8, dtype=torch.uint8, device="meta")


V = vector()
DEFERRED = (V, V, None)
PLAIN = (None, None, None)


def conv(op: str, *, stride: int = 1, groups: int = 1, deferred: bool = True, batch: bool = True, skip: bool = False):
    """The arguments of a convolution's op."""
    stem, direction = op.split("_")
    kernel = int(stem[-1])
    x, w, read = image(), weight(kernel, groups), DEFERRED if deferred else PLAIN
    geometry = (stride, 1, groups)
    out = image(K, -(-H // stride), -(-W // stride))
    if direction == "fprop":
        return (x, *read, w, *geometry, True)
    if direction == "infer":
        return (x, *read, w, vector(K), out if skip else None, *geometry, True, None)
    k = vector(K)
    gradient = (out, mask(out), torch.empty_like(out), k, k, k) if batch else (out, None, None, k, None, None)
    skips = (image(), mask(image())) if skip else (None, None)
    if direction == "wgrad":
        return (*gradient, w, x, *read, *geometry, torch.float32)
    norm = (V, V) if deferred else (None, None)
    dgrad = (*gradient, w, x, *read, *norm, *skips, 1.0, *geometry)
    return dgrad if direction == "dgrad" else (*dgrad, torch.float32)


CONVOLUTIONS = [
    # op, options, bytes by hand, FLOPs by hand
    ("conv1x1_fprop", {}, X + W1 + Y, FLOPS1),
    ("conv1x1_fprop", {"stride": 2}, X // 4 + W1 + Y // 4, FLOPS1 // 4),  # a quarter of the pixels
    ("conv3x3_fprop", {}, X + W3 + Y, 9 * FLOPS1),
    ("conv3x3_fprop", {"stride": 2}, X + W3 + Y // 4, 9 * FLOPS1 // 4),  # the taps reach every pixel
    ("conv3x3_fprop", {"groups": 4}, X + W3 // 4 + Y, 9 * FLOPS1 // 4),
    ("conv1x1_infer", {}, X + W1 + Y, FLOPS1),
    ("conv1x1_infer", {"skip": True}, X + W1 + 2 * Y, FLOPS1),
    ("conv3x3_infer", {"deferred": False}, X + W3 + Y, 9 * FLOPS1),
    # dz, its mask (a 16th) and y; the weight; the deferred input for its ReLU; dx
    ("conv1x1_dgrad", {}, 2 * Y + Y // 16 + W1 + 2 * X, FLOPS1),
    ("conv1x1_dgrad", {"deferred": False}, 2 * Y + Y // 16 + W1 + X, FLOPS1),  # a plain input is not read
    ("conv1x1_dgrad", {"batch": False}, Y + W1 + 2 * X, FLOPS1),
    ("conv1x1_dgrad", {"deferred": False, "skip": True}, 2 * Y + Y // 16 + W1 + 2 * X + X // 16, FLOPS1),
    ("conv1x1_dgrad", {"stride": 2}, (2 * Y + Y // 16) // 4 + W1 + X // 4 + X, FLOPS1 // 4),
    ("conv3x3_dgrad", {}, 2 * Y + Y // 16 + W3 + 2 * X, 9 * FLOPS1),
    ("conv1x1_wgrad", {}, 2 * Y + Y // 16 + X + 2 * W1, FLOPS1),  # dw in fp32
    ("conv3x3_wgrad", {"groups": 4}, 2 * Y + Y // 16 + X + 2 * W3 // 4, 9 * FLOPS1 // 4),
    ("conv1x1_bprop", {}, 2 * Y + Y // 16 + W1 + 2 * X + 2 * W1, 2 * FLOPS1),  # what both parts read, once
    ("conv3x3_bprop", {"deferred": False}, 2 * Y + Y // 16 + W3 + 2 * X + 2 * W3, 18 * FLOPS1),
]  # fmt: skip


@pytest.mark.parametrize(("op", "options", "moved", "flops"), CONVOLUTIONS)
def test_convolutions_against_counts_by_hand(op, options, moved, flops) -> None:
    assert traffic.of(op, conv(op, **options)) == Traffic(moved, flops)


def test_bprop_is_its_dgrad_and_its_wgrad() -> None:
    args = conv("conv3x3_bprop", skip=True)
    (dgrad, dgrad_args), (wgrad, wgrad_args) = traffic.parts("conv3x3_bprop", args)
    assert (dgrad, wgrad) == ("conv3x3_dgrad", "conv3x3_wgrad")
    assert traffic.of(dgrad, dgrad_args) == traffic.of("conv3x3_dgrad", conv("conv3x3_dgrad", skip=True))
    assert traffic.of(wgrad, wgrad_args) == traffic.of("conv3x3_wgrad", conv("conv3x3_wgrad"))
    assert traffic.parts("bn_statistics", (A,)) == (("bn_statistics", (A,)),)


def count(tiles: int = 3) -> torch.Tensor:
    return torch.empty(tiles, dtype=torch.int32, device="meta")


TILES = torch.empty(3, C, device="meta")
A = image()  # the tensors of the block end
POOLED = 2 * N * C * (H // 2) * (W // 2)
MIX = [1.0, 0.0, 1.0, 0.0]
GATED = [0.0, 1.0, 1.0, -1.0]
GATE = image(1, 1, 1)
END = (image(), V, V, image(), None, None)

OTHERS = [
    ("bn_statistics", (A,), X),
    ("bn_merge", (count(), TILES, TILES.clone()), 12 + 2 * 3 * C * 4 + 2 * C * 4),
    ("bn_finalize", (count(), TILES, TILES.clone(), vector(), vector(), 1e-5), 12 + 6 * C * 4 + 2 * C * 4 + 5 * C * 4),
    ("bn_coefficients", (vector(), vector(), None, vector(), vector(), count()), 4 * C * 4 + 12 + 3 * C * 4),
    ("bn_add_relu_forward", (*END, None, MIX, False, True, None, True, True), 3 * X + X // 16),
    ("bn_add_relu_forward", (*END, None, [1.0, 0.0, 0.0, 0.0], False, True, None, False, False), 2 * X),
    ("bn_add_relu_forward", (*END, GATE, GATED, False, True, None, False, False), 3 * X + 2 * N),
    ("bn_add_relu_mask", (A, mask(A)), 2 * X + X // 16),
    ("bn_add_relu_reduce", (A, mask(A), image(), V, V, None, None, None), 2 * X + X // 16),
    ("bn_add_relu_reduce", (A, mask(A), image(), V, V, image(), V, V), 3 * X + X // 16),
    ("bn_add_relu_apply", (A, mask(A), image(), V, V, V, None, None, 1.0), 3 * X + X // 16),
    ("bn_add_relu_apply", (A, None, image(), V, None, None, None, None, 1.0), 2 * X),  # y for its dtype alone
    ("bn_add_relu_apply", (A, mask(A), image(), V, V, V, image(), None, 1.0), 4 * X + X // 16),
    ("bn_add_relu_pool", (A, V, V), X + 2 * N * C),
    ("bn_add_relu_spread", (A, image(C, 1, 1)), 2 * X + 2 * N * C),
    ("stem_forward", (A, V, V), X + POOLED),
    ("stem_reduce", (image(C, H // 2, W // 2), A, V, V, V, V), POOLED + X),
    ("stem_apply", (image(C, H // 2, W // 2), A, V, V, V, V, V), POOLED + 2 * X),
    ("stem_backward", (image(C, H // 2, W // 2), A, V, V, V, V, None, count()), 2 * POOLED + 3 * X),
    ("stem_backward", (image(C, H // 2, W // 2), A, V, V, V, V, None, None), POOLED + 2 * X),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "moved"), OTHERS)
def test_the_other_ops_against_counts_by_hand(op, args, moved) -> None:
    assert traffic.of(op, args) == Traffic(moved, 0)


def end_backward(**given):
    """Arguments of bn_add_relu_backward: no norms, sums or gate unless given."""
    known = dict.fromkeys(
        "sign scale shift mean rstd shortcut_scale shortcut_shift shortcut_mean shortcut_rstd gate slope".split()
    )
    known |= {"dout": image(), "y": image(), "shortcut": image(), "mix": MIX, "branch_relu": False}
    known |= {"need_shortcut": False, "need_gate": False, **given}
    return tuple(known[argument.name] for argument in ops["bn_add_relu_backward"].overload._schema.arguments)


@pytest.mark.parametrize(
    ("given", "moved"),
    [
        ({}, 2 * X),  # dout and dz: neither summand is read
        ({"mean": V, "rstd": V}, 3 * X),
        ({"branch_relu": True}, 3 * X),
        ({"mean": V, "rstd": V, "need_shortcut": True}, 4 * X),
        ({"shortcut_mean": V, "shortcut_rstd": V}, 3 * X),
        ({"slope": V}, 4 * X),  # its gradient depends on the sum
        ({"gate": image(), "mix": GATED, "need_gate": True}, 2 * X + 2 * X + X + 2 * X),  # F, S; the gate; fp32 dgate
        ({"gate": GATE, "mix": [0.0, 1.0, 1.0, 0.0], "need_gate": True}, 3 * X + 2 * N + 4 * N),  # S is not needed
    ],
)
def test_backward_of_the_end_reads_what_its_results_depend_on(given, moved) -> None:
    assert traffic.of("bn_add_relu_backward", end_backward(**given)) == Traffic(moved, 0)


def test_stem_infer_counts_the_convolution_and_the_pooled_output() -> None:
    x, w = image(3, 224, 224), torch.empty(64, 3, 7, 7, dtype=torch.bfloat16, device="meta")
    found = traffic.of("stem_infer", (x, w, vector(64), 2, 3))
    assert found.bytes == 2 * (N * 3 * 224 * 224 + 64 * 3 * 49 + N * 64 * 56 * 56)
    assert found.flops == 2 * N * 112 * 112 * 64 * 3 * 49


def test_every_op_has_a_count() -> None:
    counted = {op for op, *_ in (*CONVOLUTIONS, *OTHERS)} | {"bn_add_relu_backward", "stem_infer", "conv3x3_wgrad"}
    assert counted == set(ops)
    assert len(ops) == 26


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        ("conv5x5_fprop", (), "to be a registered op, got 'conv5x5_fprop'"),
        ("bn_statistics", (), "expected 1 arguments"),
    ],
)
def test_unknown_calls_are_refused(op, args, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        traffic.of(op, args)


def test_one_tensor_in_two_roles_is_read_once() -> None:
    a, bits = image(), mask(image())
    alone = traffic.of("bn_add_relu_apply", (a, bits, image(), V, V, V, None, None, 1.0))
    assert traffic.of("bn_add_relu_apply", (a, bits, image(), V, V, V, a, bits, 1.0)) == alone


def test_real_and_fake_tensors_count_alike() -> None:
    """What a model's calls tell while it runs, and what the same calls tell on fake tensors."""
    block = resnet_fused.Bottleneck(16, 4)
    x = torch.randn(2, 16, 5, 6, requires_grad=True)
    real: list[Traffic] = []

    class Observed:
        def __init__(self, op, args) -> None:
            real.extend(traffic.of(*part) for part in traffic.parts(op, args))

        def __enter__(self) -> None: ...

        def __exit__(self, *error) -> None: ...

    with packed_masks(), observed(Observed):
        block(x).sum().backward()
    found = [row for row in traffic.count(block, x).fused if row.op in ops]
    assert sum(t.bytes for t in real) == sum(row.traffic.bytes for row in found) > 0
    assert sum(t.flops for t in real) == sum(row.traffic.flops for row in found) > 0


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bottleneck() -> tuple[traffic.Count, int]:
    """A Bottleneck of ResNet-50's first stage, and the bytes B of its output."""
    block = resnet_fused.Bottleneck(256, 64).bfloat16()
    x = torch.empty(32, 256, 56, 56, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    return traffic.count(block, x.requires_grad_()), x.numel() * x.element_size()


@pytest.mark.parametrize(
    ("side", "phase", "expected"),
    [("fused", "forward", 6.0), ("eager", "forward", 13.5), ("fused", "backward", 12.7), ("eager", "backward", 21.0)],
)
def test_a_bottleneck_moves_what_the_design_says(bottleneck, side, phase, expected) -> None:
    found, size = bottleneck
    # The table rounds, and leaves out masks (a 16th each time) and weights.
    assert found.total(side, phase=phase).bytes / size == pytest.approx(expected, abs=0.1)


def test_a_bottleneck_by_hand(bottleneck) -> None:
    """B of the output, S = B / 4 of an inner tensor, M = B / 16 of a mask; weights beside them."""
    found, b = bottleneck
    s, m = b // 4, b // 16
    w1, w2, w3 = 2 * 256 * 64, 2 * 9 * 64 * 64, 2 * 64 * 256
    by_hand = {
        ("forward", "conv1x1_fprop"): (b + w1 + s) + (s + w3 + b),
        ("forward", "conv3x3_fprop"): s + w2 + s,
        ("forward", "bn_add_relu_forward"): 2 * b + b + m,
        ("backward", "bn_add_relu_reduce"): 2 * b + m,
        ("backward", "conv1x1_dgrad"): (2 * b + m + w3 + s + s) + (2 * s + w1 + b + m + b),
        ("backward", "conv1x1_wgrad"): (2 * b + m + s + w3) + (2 * s + b + w1),
        ("backward", "conv3x3_dgrad"): 2 * s + w2 + s + s,
        ("backward", "conv3x3_wgrad"): 2 * s + s + w2,
    }
    rows = {(row.phase, row.op): row.traffic.bytes for row in found.fused}
    assert {key: rows[key] for key in by_hand} == by_hand
    vectors = sum(size for key, size in rows.items() if key not in by_hand)
    assert vectors < sum(by_hand.values()) / 500


def test_flops_of_a_bottleneck(bottleneck) -> None:
    found, _ = bottleneck
    forward = 2 * 32 * 56 * 56 * (256 * 64 + 9 * 64 * 64 + 64 * 256)
    for side in ("fused", "eager"):
        assert found.total(side, phase="forward").flops == forward
        assert found.total(side, phase="backward").flops == 2 * forward


def test_inference_of_a_bottleneck_is_three_convolutions() -> None:
    block = resnet_fused.Bottleneck(256, 64).bfloat16()
    x = torch.empty(8, 256, 14, 14, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    found = traffic.count(block, x, "infer")
    b, s = 2 * x.numel(), x.numel() // 2
    weights = 2 * (2 * 256 * 64 + 9 * 64 * 64)
    assert found.total("fused").bytes == (b + s) + (2 * s) + (s + b + b) + weights
    assert [row.op for row in found.fused] == ["conv1x1_infer", "conv3x3_infer"]  # folding is not part of a call


def test_eager_batch_norm_reads_its_input_twice() -> None:
    x = torch.empty(4, 8, 6, 6, requires_grad=True)
    size = 4 * x.numel()
    found = traffic.count(nn.Sequential(nn.BatchNorm2d(8)), x)
    rows = {row.phase: row.traffic.bytes for row in found.eager if "batch_norm" in row.op}
    assert rows["forward"] == pytest.approx(3 * size, rel=0.1)
    assert rows["backward"] == pytest.approx(5 * size, rel=0.1)
    frozen = traffic.count(nn.Sequential(nn.BatchNorm2d(8)), x, "infer")
    assert frozen.total("eager").bytes == pytest.approx(2 * size, rel=0.1)


@pytest.fixture(scope="module")
def resnet18() -> traffic.Count:
    return traffic.count(torchvision.models.resnet18().bfloat16(), torch.empty(2, 3, 64, 64, dtype=torch.bfloat16))


def test_a_network_is_counted_block_by_block(resnet18) -> None:
    layers = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert [name for name in resnet18.blocks() if name] == ["stem", *layers, "avgpool", "fc"]
    for side in ("fused", "eager"):
        total = sum((resnet18.total(side, block) for block in resnet18.blocks()), Traffic(0, 0))
        assert total == resnet18.total(side)
    for name in ("stem", *layers):
        assert 0 < resnet18.total("fused", name, "backward").bytes < resnet18.total("eager", name, "backward").bytes
        assert 0 < resnet18.total("fused", name, "forward").bytes < resnet18.total("eager", name, "forward").bytes
    for name in ("avgpool", "fc"):
        assert resnet18.total("fused", name).flops == resnet18.total("eager", name).flops


def test_both_sides_do_the_same_arithmetic(resnet18) -> None:
    assert resnet18.total("fused").flops == resnet18.total("eager").flops
    # A known figure: 1.81 GFLOP (multiply-adds) forward at 224x224; at 64x64 the convolutions are (64 / 224)^2 of it.
    forward = resnet18.total("fused", phase="forward").flops / 2 / 2
    assert forward == pytest.approx(1.814e9 * (64 / 224) ** 2, rel=0.01)


def test_the_sum_of_a_block_s_gradients_belongs_to_the_block() -> None:
    """Eager adds the gradients of the identity and of the branch, 3 tensors, after the block's last node."""
    block = torchvision.models.resnet.BasicBlock(8, 8)
    x = torch.empty(2, 8, 5, 5)
    found = traffic.count(nn.Sequential(nn.Conv2d(8, 8, 1), block), x)
    added = [row for row in found.eager if row.phase == "backward" and row.op == "add"]
    assert [(row.block, row.traffic.bytes) for row in added] == [("1", 3 * 4 * x.numel())]


def test_counting_leaves_the_model_alone() -> None:
    model = torchvision.models.resnet18()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    traffic.count(model, torch.empty(2, 3, 32, 32))
    assert type(model) is torchvision.models.ResNet
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("unit", ["original", "bn_after_add", "relu_before_add", "relu_preact", "full_preact"])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_units_of_every_order_are_counted(unit, mode) -> None:
    block = resnet_fused.BottleneckUnit(16, 4, unit=unit)
    found = traffic.count(block, torch.empty(2, 16, 6, 6, requires_grad=mode == "train"), mode)
    assert 0 < found.total("fused").bytes < found.total("eager").bytes
    assert found.total("fused").flops == found.total("eager").flops > 0


def test_gated_units_are_counted() -> None:
    rule = resnet_fused.blocks.mixing.SqueezeExcitation(16, 4)
    found = traffic.count(resnet_fused.BasicUnit(16, 16, mixing=rule), torch.empty(2, 16, 6, 6, requires_grad=True))
    assert {"bn_add_relu_pool", "bn_add_relu_backward"} <= {row.op for row in found.fused}


def test_recomputed_convolutions_are_counted_in_backward() -> None:
    """One more 1x1 convolution for the last layer, and for the projection: its input, weight and output once."""
    n, h, w, c, inner, k = 2, 6, 8, 16, 4, 32
    down = nn.Sequential(nn.Conv2d(c, k, 1, 2, bias=False), nn.BatchNorm2d(k))
    block = resnet_fused.Bottleneck(c, k // 4, 2, down, base_width=32)
    x = torch.empty(n, c, h, w, requires_grad=True)
    saves = traffic.count(block, x)
    recomputes = traffic.count(resnet_fused.fuse(block, memory="recompute"), x)
    assert recomputes.eager == saves.eager
    last = 4 * (n * inner * h * w // 4 + inner * k + n * k * h * w // 4)
    projection = 4 * (n * c * h * w // 4 + c * k + n * k * h * w // 4)  # stride 2 reads a quarter
    extra = Traffic(last + projection, 2 * (n * h * w // 4) * (inner + c) * k)
    rows = [row for row in recomputes.fused if row.phase == "backward" and row.op == "conv1x1_fprop"]
    assert [(row.calls, row.traffic) for row in rows] == [(2, extra)]
    assert recomputes.total("fused") == saves.total("fused") + extra
    assert block._resnet_fused_memory == "recompute"


def test_each_block_is_counted_with_its_own_memory() -> None:
    model = torchvision.models.resnet18()
    resnet_fused.fuse(model, memory="recompute", filter_fn=lambda name, module: name == "layer2.1")
    found = traffic.count(model, torch.empty(2, 3, 32, 32))
    again = [row.block for row in found.fused if row.phase == "backward" and row.op.endswith("fprop")]
    assert again == ["layer2.1"]


def test_str_and_dict_tell_the_same(resnet18) -> None:
    text = str(resnet18)
    assert text.splitlines()[0].split() == ["block", "MB", "an", "image", "eager", "ratio", "GFLOP"]
    known = resnet18.to_dict()
    fused = known["totals"]["fused"]["bytes"]
    assert text.splitlines()[-1].split()[:2] == ["all", f"{fused / 2 / 1e6:.3f}"]
    assert sum(row["bytes"] for row in known["rows"]["fused"]) == fused


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="expected mode to be train or infer, got 'eval'"):
        traffic.count(nn.Conv2d(1, 1, 1), torch.empty(1, 1, 1, 1), "eval")


# --- what is saved for backward ---------------------------------------------------------------------------------------


def vectors(*norms: int) -> int:
    """Bytes that the norms over so many channels keep: scale, shift, mean, rstd in fp32, and one tile's count."""
    return sum(4 * 4 * channels + 4 for channels in norms)


@pytest.mark.parametrize("memory", ["save", "recompute"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_bottleneck_saves_what_the_design_says(memory, packed) -> None:
    """B of the output, S = B / 4 of an inner tensor, M = B / 16 of a mask."""
    block = resnet_fused.fuse(resnet_fused.Bottleneck(64, 16).bfloat16(), memory=memory)
    x = torch.empty(4, 64, 6, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    b = x.numel() * 2
    s, m = b // 4, b // 16
    expected = b + 2 * s + (b if memory == "save" else 0) + (m if packed else b) + vectors(16, 16, 64)
    assert traffic.saved_bytes(block, x, packed=packed) == expected


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_a_projection_is_saved_as_the_last_convolution_is(memory) -> None:
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    block = resnet_fused.fuse(resnet_fused.BasicBlock(8, 16, 2, down), memory=memory)
    x = torch.empty(2, 8, 6, 8).to(memory_format=torch.channels_last)
    y = 4 * 2 * 16 * 3 * 4
    outputs = 3 * y if memory == "save" else y
    assert traffic.saved_bytes(block, x) == 2 * y + outputs + y // 32 + vectors(16, 16, 16)


def test_a_unit_with_a_norm_of_the_sum_saves_the_sum() -> None:
    block = resnet_fused.BasicUnit(8, 8, unit="bn_after_add")
    x = torch.empty(2, 8, 4, 4).to(memory_format=torch.channels_last)
    b = 4 * x.numel()
    for memory in ("save", "recompute"):  # nobody reads what the branch ends in
        block = resnet_fused.fuse(block, memory=memory)
        assert traffic.saved_bytes(block, x) == 3 * b + b // 32 + vectors(8, 8)


def kept(model: nn.Module, x: torch.Tensor) -> int:
    """The same count on real tensors."""
    found = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    assert out.requires_grad
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in own)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("how", ["eager", "save", "recompute"])
@pytest.mark.parametrize("training", [True, False])
def test_saved_bytes_are_those_of_real_tensors(how, layout, training) -> None:
    model = torchvision.models.resnet18().train(training)
    if how != "eager":
        resnet_fused.fuse(model, memory=how)
    x = torch.randn(2, 3, 48, 40).to(memory_format=layout)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = traffic.saved_bytes(model, x, packed=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert found == kept(model, x) > 0


def test_saved_bytes_heed_autocast() -> None:
    """A convolution keeps its input and its weight as autocast casts them; two batches differ by their images alone."""
    model = nn.Conv2d(4, 8, 1, bias=False)

    def saved(images: int) -> int:
        with torch.autocast("cpu", torch.bfloat16):
            return traffic.saved_bytes(model, torch.empty(images, 4, 6, 6))

    assert saved(3) == 2 * (3 * 4 * 36 + 4 * 8)
    assert saved(5) - saved(3) == 2 * (2 * 4 * 36)


def test_nothing_is_saved_without_gradients() -> None:
    with torch.no_grad():
        assert traffic.saved_bytes(resnet_fused.BasicBlock(4, 4), torch.empty(1, 4, 4, 4)) == 0


class Views(nn.Module):
    """Keeps two parts of one tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return y[:1].sin() + y[2:].sin()


def test_views_are_saved_with_all_of_their_storage_once() -> None:
    x = torch.empty(3, 4, 5, 5, requires_grad=True)
    assert traffic.saved_bytes(Views(), x) == 4 * x.numel() == kept(Views(), x)
