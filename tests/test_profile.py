"""``profile``: ranges, the readers of each profiler's format, the table, and the command.

Files of profilers are written here in the format that the real tools write, with made-up values.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torchvision

import resnet_fused
from resnet_fused import cli
from resnet_fused.blocks.paths import recording
from resnet_fused.cli.ceilings import Rates
from resnet_fused.ops._op import observed
from resnet_fused.profiling import __main__ as process
from resnet_fused.profiling import blocks, capture, ncu, ranges, table, trace
from resnet_fused.profiling.ranges import Call, Place
from resnet_fused.profiling.table import Kernel

SMALL = ("resnet_fused.models:cifar_resnet20", "--size", "16", "--batch", "2")
RATES = Rates(1e12, 1e14)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["profile", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def resnet18() -> torch.nn.Module:
    return resnet_fused.fuse(torchvision.models.resnet18(num_classes=10))


LAYERS = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]


class Names:
    """A listener that lists what it is told, and the ranges of ops."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.depth = 0

    def enter(self, block: str, phase: str) -> None:
        self.entered.append(f"{block} {phase}")
        self.depth += 1

    def leave(self) -> None:
        self.depth -= 1


# --- blocks and ranges ------------------------------------------------------------------------------------------------


def test_blocks_of_a_network(resnet18) -> None:
    assert list(blocks.modules(resnet18)) == ["stem", *LAYERS, "avgpool", "fc"]
    assert list(blocks.modules(resnet18.layer1[0])) == [blocks.MODEL]
    units = resnet_fused.models.preact_resnet18()
    assert {"layer1.0", "layer4.1"} <= set(blocks.modules(units))


def test_every_block_is_entered_forward_and_backward_on_its_fused_path(resnet18) -> None:
    names = Names()
    with blocks.watched(resnet18, names), recording() as calls:
        resnet18(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [c.path for c in calls] == ["train"] * 9
    order = ["stem", *LAYERS, "avgpool", "fc"]
    assert [n for n in dict.fromkeys(names.entered) if n.endswith("forward")] == [f"{n} forward" for n in order]
    assert [n for n in dict.fromkeys(names.entered) if n.endswith("backward")] == [f"{n} backward" for n in order[::-1]]
    assert names.depth == 0


def test_watching_leaves_nothing_behind(resnet18) -> None:
    with blocks.watched(resnet18, Names()):
        pass
    assert "_fused_stem" not in vars(resnet18)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in resnet18.modules())


def test_calls_of_a_training_step_are_listed_with_block_phase_and_traffic() -> None:
    block = resnet_fused.Bottleneck(16, 4)
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    with ranges.ranged(block, lambda name: contextlib.nullcontext()) as calls:
        block(x).sum().backward()
    forward = [c.op for c in calls if c.phase == "forward"]
    assert forward[::2] == ["conv1x1_fprop", "conv3x3_fprop", "conv1x1_fprop", "bn_add_relu_forward"]
    assert [c.op for c in calls if c.phase == "backward" and c.op.endswith("bprop")] == [
        "conv1x1_bprop", "conv3x3_bprop", "conv1x1_bprop",
    ]  # fmt: skip
    assert [c.index for c in calls] == list(range(len(calls)))
    assert {c.block for c in calls} == {blocks.MODEL}
    assert calls[0].shape == (2, 16, 6, 6)
    assert calls[0].flops == 2 * 2 * 36 * 16 * 4
    assert calls[0].bytes == 4 * (2 * 36 * 16 + 16 * 4 + 2 * 36 * 4)


def test_ops_lie_in_the_range_of_their_block() -> None:
    open_ranges: list[str] = []
    seen: list[tuple[str, ...]] = []

    @contextlib.contextmanager
    def make(name: str):
        open_ranges.append(name)
        seen.append(tuple(open_ranges))
        yield
        open_ranges.pop()

    model = resnet_fused.fuse(torchvision.models.resnet18(num_classes=10))
    with ranges.ranged(model, make):
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    inner = [names for names in seen if "#" in names[-1]]
    assert all(len(names) == 2 and ranges.is_range(names[0]) for names in inner)
    assert ("layer1.0 forward", "conv3x3_fprop #3") in inner  # after the stem's three
    assert ("stem backward", inner[-1][1]) == inner[-1]
    assert inner[-1][1].startswith("stem_backward #")
    assert not open_ranges


def test_bound_inference_is_seen_and_forgotten_afterwards() -> None:
    """Kernels that inference bound before pass by the ops; within ranges they are bound anew, and watched."""
    model = resnet_fused.fuse(torchvision.models.resnet18(num_classes=10)).eval()
    x = torch.randn(1, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        wanted = model(x)
        with ranges.ranged(model, lambda name: contextlib.nullcontext()) as calls:
            model(x)
            first = len(calls)
            got = model(x)
            assert [c.op for c in calls[first:]] == [c.op for c in calls[:first]]
        strided = ["conv1x1_infer", *["conv3x3_infer"] * 4]  # the projection comes first
        assert [c.op for c in calls[:first]] == ["stem_infer", *["conv3x3_infer"] * 4, *strided * 3]
        assert {c.phase for c in calls} == {"forward"}
        model(x)
        assert len(calls) == 2 * first
    torch.testing.assert_close(got, wanted)


def test_ops_of_other_threads_are_observed() -> None:
    """On a GPU backward runs in a thread of autograd's, where context variables of the caller are not set."""
    block = resnet_fused.BasicBlock(4, 4)
    out = block(torch.randn(2, 4, 5, 5, requires_grad=True)).sum()
    seen: list[str] = []

    def note(op: str, args: tuple):
        seen.append(op)
        return contextlib.nullcontext()

    with observed(note):
        thread = threading.Thread(target=out.backward)
        thread.start()
        thread.join()
    assert seen.count("conv3x3_bprop") == 2
    block(torch.randn(2, 4, 5, 5)).sum().backward()
    assert seen.count("conv3x3_fprop") == 0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], Place()),
        (["layer2.0 forward"], Place("layer2.0", "forward")),
        (["step", "layer2.0 backward", "conv1x1_bprop #12"], Place("layer2.0", "backward", 12)),
        (["(model) forward", "bn_statistics #0", "aten::var_mean"], Place("(model)", "forward", 0)),
        (["Optimizer.step#SGD.step"], Place()),
    ],
)
def test_place_from_the_open_ranges(names, expected) -> None:
    assert ranges.place(names) == expected


INJECTION = r"""
#include <nvtx3/nvToolsExt.h>
#include <stdint.h>
#include <stdio.h>

static nvtxDomainHandle_t create(const char* name) {
  printf("domain %s\n", name);
  return (nvtxDomainHandle_t)(uintptr_t)7;
}
static int push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* a) {
  int known = a->version == NVTX_VERSION && a->size == sizeof *a && a->messageType == NVTX_MESSAGE_TYPE_ASCII;
  printf("push %d %s %s\n", (int)(uintptr_t)domain, known ? "known" : "unknown", a->message.ascii);
  return 0;
}
static int pop(nvtxDomainHandle_t domain) {
  printf("pop %d\n", (int)(uintptr_t)domain);
  return 0;
}
int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t export_table) {
  NvtxFunctionTable table;
  unsigned int size;
  const NvtxExportTableCallbacks* callbacks = export_table(NVTX_ETID_CALLBACKS);
  callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size);
  *table[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)create;
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)push;
  *table[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)pop;
  return 1;
}
"""


def test_nvtx_ranges_reach_a_tool_with_their_domain(tmp_path) -> None:
    """A tool that NVTX itself loads, compiled against its header, prints what it is told."""
    headers = [Path(entry) / "nvidia" / "cu13" / "include" for entry in sys.path]
    include = next((path for path in headers if (path / "nvtx3" / "nvToolsExt.h").exists()), None)
    compiler = shutil.which("cc")
    if include is None or compiler is None or ranges.nvtx_domain() is None:
        pytest.skip("needs NVTX's library and headers (nvidia-nvtx) and a C compiler")
    source, tool = tmp_path / "tool.c", tmp_path / "tool.so"
    source.write_text(INJECTION)
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(tool)], check=True)
    code = (
        "from resnet_fused.profiling.ranges import nvtx\n"
        "with nvtx('layer2.0 forward'):\n    with nvtx('conv1x1_fprop #3'): pass\n"
    )
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(tool)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "domain resnet_fused", "push 7 known layer2.0 forward", "push 7 known conv1x1_fprop #3", "pop 7", "pop 7",
    ]  # fmt: skip


# --- ncu --------------------------------------------------------------------------------------------------------------

NVTX = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
ISSUE = "sm__inst_issued.avg.pct_of_peak_sustained_elapsed"
L1_BANKS = "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed"
UNITS = {
    ncu.TIME: "ns", ncu.READ: "byte", ncu.WRITTEN: "byte", ncu.SM: "%", ncu.MEMORY: "%", ncu.DRAM: "%", ncu.L2: "%",
    ncu.L1: "%", ncu.TENSOR: "%", ncu.OCCUPANCY: "%", ncu.REGISTERS: "register/thread", ISSUE: "%", L1_BANKS: "%",
}  # fmt: skip
KERNEL = {
    ncu.TIME: "100,000", ncu.READ: "60,000,000", ncu.WRITTEN: "20,000,000", ncu.SM: "40.5", ncu.MEMORY: "83.25",
    ncu.DRAM: "83.25", ncu.L2: "50", ncu.L1: "30", ncu.TENSOR: "25.5", ncu.OCCUPANCY: "47.5", ncu.REGISTERS: "168",
    ISSUE: "40.5", L1_BANKS: "12",
}  # fmt: skip


def nvtx_field(*names: str) -> str:
    """As ncu prints the stack of one thread."""
    stack = "  ".join(f'"resnet_fused:{name}:none:none:none:none:none:none"' for name in names)
    return f"4711  {stack} " if names else ""


def raw_page(*kernels: dict[str, str], units: dict[str, str] = UNITS) -> str:
    """``ncu --import ... --csv --page raw``: log, header, units, and a row for each kernel."""
    fixed = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size"]
    fixed += ["Grid Size", "Device", "CC", NVTX]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow([*fixed, *units])
    writer.writerow([""] * len(fixed) + list(units.values()))
    for i, kernel in enumerate(kernels):
        known = {"ID": str(i), "Kernel Name": "kernel", **KERNEL, **kernel}
        writer.writerow([known.get(name, "0") for name in (*fixed, *units)])
    return f"==PROF== Connected to process 4711 (/usr/bin/python3.12)\n{text.getvalue()}"


def test_a_raw_page_becomes_kernels() -> None:
    page = raw_page(
        {"Kernel Name": "_fprop", NVTX: nvtx_field("layer2.0 forward", "conv1x1_fprop #3")},
        {"Kernel Name": "elementwise, <4>", NVTX: nvtx_field("layer2.0 backward"), ncu.REGISTERS: "32"},
        {NVTX: ""},
    )
    first, second, third = ncu.read(page)
    assert first == Kernel(
        "_fprop", Place("layer2.0", "forward", 3), 1e-4, 8e7, "DRAM 83%", 168, 0.475, 0.8325, 0.405, 0.255
    )
    assert (second.name, second.place, second.registers) == ("elementwise, <4>", Place("layer2.0", "backward"), 32)
    assert third.place == Place()


def test_ranges_of_the_default_domain_and_of_others_are_read_too() -> None:
    field = '7  "<default domain>:layer1.0 forward:none:none:none:none:none:none"  "NCCL:ncclAllReduce:none"  '
    (kernel,) = ncu.read(raw_page({NVTX: field + '"<default domain>:conv3x3_fprop #1:none"'}))
    assert kernel.place == Place("layer1.0", "forward", 1)


@pytest.mark.parametrize(
    ("unit", "text", "seconds"),
    [("us", "100", 1e-4), ("usecond", "100", 1e-4), ("ms", "0.1", 1e-4), ("second", "2", 2.0)],
)
def test_units_of_time(unit, text, seconds) -> None:
    (kernel,) = ncu.read(raw_page({ncu.TIME: text}, units={**UNITS, ncu.TIME: unit}))
    assert kernel.time_s == pytest.approx(seconds)


@pytest.mark.parametrize(("unit", "text"), [("Mbyte", "60"), ("Kbyte", "60,000"), ("byte", "60000000")])
def test_units_of_bytes(unit, text) -> None:
    (kernel,) = ncu.read(raw_page({ncu.READ: text, ncu.WRITTEN: "0"}, units={**UNITS, ncu.READ: unit}))
    assert kernel.dram_bytes == pytest.approx(6e7)


@pytest.mark.parametrize(
    ("utilisations", "expected"),
    [
        ({ncu.DRAM: 83.0, ISSUE: 40.0}, "DRAM 83%"),
        ({ncu.L2: 71.0, ncu.DRAM: 70.0}, "L2 71%"),
        ({ncu.L1: 90.0}, "L1 and shared memory 90%"),
        ({"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": 88.0}, "tensor cores 88%"),
        ({"sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_elapsed": 65.0}, "tensor cores 65%"),
        ({"sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_elapsed": 61.0}, "pipe lsu 61%"),
        ({"sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_elapsed": 61.0}, "pipe fma 61%"),
        ({ISSUE: 75.0}, "instruction issue 75%"),
        ({ncu.DRAM: 30.0, ISSUE: 20.0}, "latency (DRAM 30%)"),
        ({"new__unit.avg.pct_of_peak_sustained_elapsed": 99.0}, "new__unit 99%"),
    ],
)
def test_the_limiting_factor_is_the_busiest_unit(utilisations, expected) -> None:
    assert ncu.limiting_factor(utilisations) == expected


def test_a_page_without_header_or_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a raw page in CSV"):
        ncu.read("==ERROR== nothing\n")
    with pytest.raises(ValueError, match=r"expected the raw page to have dram__bytes_read\.sum, got none"):
        ncu.read(raw_page({}).replace(ncu.READ, "other"))


def test_what_ncu_has_no_data_for_is_left_out() -> None:
    (kernel,) = ncu.read(raw_page({ncu.TENSOR: "n/a", ncu.READ: "nan", ncu.REGISTERS: ""}))
    assert (kernel.tensor, kernel.dram_bytes, kernel.registers) == (None, None, None)
    assert kernel.limiting_factor == "DRAM 83%"
    with pytest.raises(ValueError, match=r"expected gpu__time_duration\.sum of kernel to be a number, got 'n/a'"):
        ncu.read(raw_page({ncu.TIME: "n/a"}))


def test_a_page_without_kernels_is_empty() -> None:
    assert ncu.read(raw_page()) == []


def test_the_command_selects_the_block_within_the_captured_region(tmp_path) -> None:
    command = ncu.command("ncu", tmp_path / "r", "layer2.0", "resnet_fused", ["python", "x.py"])
    includes = [command[i + 1] for i, part in enumerate(command) if part == "--nvtx-include"]
    assert includes == ["resnet_fused@layer2.0 forward/", "resnet_fused@layer2.0 backward/"]
    assert command[command.index("--profile-from-start") + 1] == "off"
    assert set(command[command.index("--metrics") + 1].split(",")) == {*ncu.METRICS, *ncu.BREAKDOWNS}
    assert command[-2:] == ["python", "x.py"]
    assert "--nvtx-include" not in ncu.command("ncu", tmp_path, None, "resnet_fused", [])
    assert "layer2.0 forward/" in ncu.command("ncu", tmp_path, "layer2.0", None, [])


# --- torch.profiler and nsys ------------------------------------------------------------------------------------------


def event(category: str, name: str, start: float, duration: float, tid: int = 1, **args: object) -> dict:
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": start, "dur": duration, "args": args}


def test_kernels_of_a_chrome_trace_are_placed_by_their_launch(tmp_path) -> None:
    """Backward launches from another thread, at the same time by the clock as a forward range of the first."""
    events = [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        event("user_annotation", "layer1.0 forward", 0, 100),
        event("user_annotation", "conv1x1_fprop #0", 10, 40),
        event("user_annotation", "layer1.0 backward", 0, 100, tid=2),
        event("user_annotation", "Optimizer.step#SGD.step", 0, 200),
        event("gpu_user_annotation", "layer1.0 forward", 0, 9999, tid=7),
        event("cuda_runtime", "cudaLaunchKernel", 20, 5, correlation=11),
        event("cuda_driver", "cuLaunchKernelEx", 60, 5, correlation=12),
        event("cuda_runtime", "cudaLaunchKernel", 30, 5, tid=2, correlation=13),
        event("kernel", "triton_", 310, 7.5, tid=7, correlation=12, **{"registers per thread": 64}),
        event("kernel", "gemm", 300, 5, tid=7, correlation=11, **{"est. achieved occupancy %": 25}),
        event("gpu_memset", "Memset", 320, 1, tid=7, correlation=13),
        event("kernel", "lost", 330, 1, tid=7, correlation=99),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert trace.read_chrome(path) == [
        Kernel("gemm", Place("layer1.0", "forward", 0), 5e-6, occupancy=0.25),
        Kernel("triton_", Place("layer1.0", "forward"), 7.5e-6, registers=64),
        Kernel("Memset", Place("layer1.0", "backward"), 1e-6),
        Kernel("lost", Place(), 1e-6),
    ]


def test_without_a_device_pytorch_s_outermost_ops_take_the_place_of_kernels(tmp_path) -> None:
    events = [
        event("cpu_op", "autograd::engine::evaluate_function: ResidualFunctionBackward", 0, 100),
        event("user_annotation", "layer1.0 backward", 5, 90),
        event("cpu_op", "ResidualFunctionBackward", 6, 88),  # holds a range of ours: its ops are looked into
        event("user_annotation", "conv1x1_bprop #4", 10, 50),
        event("cpu_op", "aten::conv2d", 12, 30),
        event("cpu_op", "aten::convolution", 13, 28),
        event("cpu_op", "aten::add_", 70, 5),
        event("cpu_op", "aten::sum", 200, 10),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert trace.read_chrome(path) == [
        Kernel("aten::conv2d", Place("layer1.0", "backward", 4), 30e-6),
        Kernel("aten::add_", Place("layer1.0", "backward"), 5e-6),
        Kernel("aten::sum", Place(), 10e-6),
    ]


def nsys_export(path: Path) -> None:
    """The tables of ``nsys export --type sqlite`` that are read, with their columns that are."""
    database = sqlite3.connect(path)
    database.executescript("""
        CREATE TABLE StringIds (id INTEGER, value TEXT);
        CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL
            (start INTEGER, end INTEGER, correlationId INTEGER, demangledName INTEGER, registersPerThread INTEGER);
        CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, end INTEGER, globalTid INTEGER, correlationId INTEGER);
        CREATE TABLE NVTX_EVENTS
            (start INTEGER, end INTEGER, eventType INTEGER, text TEXT, textId INTEGER, globalTid INTEGER);
        INSERT INTO StringIds VALUES (1, 'gemm'), (2, 'layer1.0 forward');
        INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (900, 1400, 6, 1, 40), (500, 800, 5, 1, 168);
        INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (30, 35, 77, 5), (30, 35, 78, 6);
        INSERT INTO NVTX_EVENTS VALUES
            (0, 100, 59, NULL, 2, 77), (20, 50, 59, 'conv1x1_fprop #0', NULL, 77),
            (0, 100, 60, 'layer9.9 forward', NULL, 78);
    """)
    database.commit()
    database.close()


def test_kernels_of_an_nsys_export_are_placed_by_their_launch(tmp_path) -> None:
    nsys_export(tmp_path / "nsys.sqlite")
    assert trace.read_nsys(tmp_path / "nsys.sqlite") == [
        Kernel("gemm", Place("layer1.0", "forward", 0), 3e-7, registers=168),
        Kernel("gemm", Place(), 5e-7, registers=40),
    ]


# --- the table --------------------------------------------------------------------------------------------------------

CALL = Call(3, "layer2.0", "forward", "conv1x1_fprop", (4, 8, 2, 2), 40_000_000, 2_000_000_000)


def test_an_op_of_one_kernel_is_held_against_its_minimum() -> None:
    kernel = Kernel("k", Place("layer2.0", "forward", 3), 1e-4, dram_bytes=8e7, limiting_factor="DRAM 83%", registers=9)
    (row,) = table.rows([kernel], [CALL], RATES, 1e-3)
    assert (row.op, row.block, row.bytes_min) == ("conv1x1_fprop", "layer2.0", 40_000_000)
    assert row.share == pytest.approx(0.1)
    assert row.bytes_ratio == pytest.approx(2)
    assert row.gb_per_s == pytest.approx(800)
    assert row.tflop_per_s == pytest.approx(20)
    assert row.bound_fraction == pytest.approx(0.4)  # 40 us of memory, 20 us of arithmetic, in 100 us


def test_what_belongs_to_an_op_is_that_of_all_its_kernels() -> None:
    place = Place("layer2.0", "forward", 3)
    first, second = Kernel("a", place, 1e-4, dram_bytes=4e7), Kernel("b", place, 3e-4, dram_bytes=8e7)
    rows = table.rows([first, second], [CALL], RATES, None)
    assert [r.bytes_ratio for r in rows] == pytest.approx([3, 3])
    assert [r.bound_fraction for r in rows] == pytest.approx([0.1, 0.1])
    assert [r.gb_per_s for r in rows] == pytest.approx([400, 8e7 / 3e-4 / 1e9])
    assert [r.share for r in rows] == [None, None]


def test_without_measured_bytes_the_rate_is_that_of_the_minimum() -> None:
    (row,) = table.rows([Kernel("a", Place("layer2.0", "forward", 3), 1e-4)], [CALL], RATES, 1e-3)
    assert (row.bytes, row.bytes_ratio) == (None, None)
    assert row.gb_per_s == pytest.approx(400)


def test_a_kernel_outside_of_all_ops_has_no_minimum() -> None:
    (row,) = table.rows([Kernel("a", Place(), 1e-4, dram_bytes=1e7)], [CALL], RATES, 1e-3)
    assert (row.op, row.call, row.bytes_min, row.bytes_ratio, row.bound_fraction) == ("", None, None, None, None)
    assert row.gb_per_s == pytest.approx(100)


def test_csv_has_every_column_and_nothing_for_the_unknown() -> None:
    text = table.to_csv(table.rows([Kernel("a, b", Place(), 1e-4)], [], RATES, None))
    (found,) = csv.DictReader(io.StringIO(text))
    assert tuple(found) == table.COLUMNS
    assert (found["kernel"], found["time_us"], found["registers"]) == ("a, b", "100.0", "")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def known_rates(monkeypatch) -> None:
    """No time is spent on measuring the machine."""
    monkeypatch.setattr(capture, "rates", lambda device, dtype: RATES)


def test_torch_gives_the_table_on_the_cpu(tmp_path, capsys, known_rates) -> None:
    code, text, error = call(capsys, *SMALL, "--block", "layer2.0", "--out", tmp_path, "--device", "cpu")
    assert code == 0, error
    assert "layer2.0 bac" in text
    assert "conv3x3_fprop" in text
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["tool"] == "torch"
    assert found["bytes_per_s"] == 1e12
    kernels = found["kernels"]
    assert {k["block"] for k in kernels} == {"layer2.0"}
    assert {k["phase"] for k in kernels} == {"forward", "backward"}
    convolution = next(k for k in kernels if k["op"] == "conv3x3_fprop")
    assert convolution["bytes_min"] == 4 * (2 * 16 * 16 * 16 + 32 * 16 * 9 + 2 * 32 * 8 * 8)
    assert convolution["time_us"] > 0
    assert 0 < convolution["bound_fraction"]
    assert {"conv3x3_bprop", "bn_add_relu_reduce"} <= {k["op"] for k in kernels}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "kernels.csv").read_text())))
    assert len(rows) == len(kernels)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_a_whole_step_of_inference(tmp_path, capsys, known_rates) -> None:
    options = ("--mode", "infer", "--out", tmp_path, "--device", "cpu", "--json")
    code, text, error = call(capsys, *SMALL, *options)
    assert code == 0, error
    kernels = json.loads(text)["kernels"]
    assert {k["phase"] for k in kernels if k["call"] is not None} == {"forward"}
    assert sum(k["op"] == "conv3x3_infer" for k in kernels) >= 18


def test_an_unknown_block_is_answered_with_the_known_ones(tmp_path, capsys, known_rates) -> None:
    code, _, error = call(capsys, *SMALL, "--block", "layer9.0", "--out", tmp_path, "--device", "cpu")
    assert code == 2
    assert "argument --block: expected one of " in error
    assert "layer1.0" in error
    assert "got 'layer9.0'" in error


def test_dry_run_prints_the_command_alone(tmp_path, capsys) -> None:
    out = tmp_path / "new"
    code, text, _ = call(capsys, "resnet50", "--block", "layer2.0", "--tool", "ncu", "--dry-run", "--out", out)
    assert code == 0
    assert text.startswith("ncu --profile-from-start off --nvtx")
    assert len(text.splitlines()) == 1
    assert not out.exists()
    code, text, _ = call(capsys, "resnet50", "--tool", "nsys", "--dry-run", "--json")
    assert json.loads(text)["command"].startswith("nsys profile --trace cuda,nvtx --capture-range cudaProfilerApi")
    code, _, error = call(capsys, "resnet50", "--dry-run")
    assert code == 2
    assert "expected --tool nsys or ncu, got torch" in error


def test_the_target_s_command_line_is_read_back() -> None:
    job = capture.Job("a:b", "train", 4, 32, "bf16", "auto", "triton", 0)
    command = capture.target(Path("x y.json"), job, "layer1.0")
    assert command[1:3] == ["-m", "resnet_fused.profiling"]
    assert capture.parse_arguments(command[3:]) == (Path("x y.json"), job, "layer1.0")
    assert capture.parse_arguments(capture.target(Path("x"), job, None)[3:])[2] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("tool", ["ncu", "nsys"])
def test_without_a_gpu_the_other_tool_is_offered(tmp_path, capsys, tool) -> None:
    code, text, error = call(capsys, *SMALL, "--tool", tool, "--out", tmp_path)
    assert code == 3
    assert text == ""
    assert len(error.strip().splitlines()) == 1
    assert f"expected a GPU for --tool {tool}, got cpu" in error
    assert "--tool torch works on the CPU" in error


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder that is the whole PATH, and a GPU as far as the command asks."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def install(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!{sys.executable}\nimport sys\n{script}")
        path.chmod(0o755)

    return install


@pytest.mark.parametrize(("tool", "package"), [("ncu", "Nsight Compute"), ("nsys", "Nsight Systems")])
def test_a_missing_tool_is_answered_with_what_to_install(tmp_path, capsys, tools, tool, package) -> None:
    code, _, error = call(capsys, *SMALL, "--tool", tool, "--out", tmp_path)
    assert code == 3
    assert f"expected {tool} on PATH, got none; install {package}" in error
    assert "--tool torch works without it" in error


def test_missing_permission_is_answered_with_its_cure(tmp_path, capsys, tools) -> None:
    tools("ncu", "print('==ERROR== ERR_NVGPUCTRPERM - The user does not have permission')\nsys.exit(1)\n")
    code, _, error = call(capsys, *SMALL, "--tool", "ncu", "--out", tmp_path)
    assert code == 3
    assert len(error.strip().splitlines()) == 1
    for part in ("ERR_NVGPUCTRPERM", "run as root", "NVreg_RestrictProfilingToAdminUsers=0", "--cap-add=SYS_ADMIN"):
        assert part in error
    assert "--tool torch works without it" in error


def test_a_tool_that_fails_is_quoted(tmp_path, capsys, tools) -> None:
    tools("ncu", "print('==ERROR== Failed to find metric x')\nprint('bye')\nsys.exit(9)\n")
    code, _, error = call(capsys, *SMALL, "--tool", "ncu", "--out", tmp_path)
    assert code == 3
    assert "expected ncu to succeed, got exit code 9: ==ERROR== Failed to find metric x" in error


def test_the_profiled_process_s_refusal_is_the_command_s(tmp_path, capsys, tools) -> None:
    says = "argument --block: expected one of stem, got 'x'"
    tools("ncu", f"print({capture.TARGET_SAYS + says!r}, file=sys.stderr)\nprint('==ERROR== code 2')\nsys.exit(2)\n")
    code, _, error = call(capsys, *SMALL, "--tool", "ncu", "--out", tmp_path)
    assert code == 2
    assert error.strip().endswith(says)


def test_the_profiled_process_writes_its_calls_or_refuses(tmp_path, capsys, monkeypatch, known_rates) -> None:
    monkeypatch.setattr(process, "cuda_profiler", contextlib.nullcontext)
    job = capture.Job(SMALL[0], "train", 2, 16, "fp32", "cpu", "auto", 0)
    path = tmp_path / "calls.json"
    assert process.main(capture.target(path, job, "layer1.0")[3:]) == 0
    assert {c.block for c in capture.Capture.read(path).calls} >= {"layer1.0", "layer3.2"}
    assert process.main(capture.target(path, job, "layer9")[3:]) == 2
    assert capsys.readouterr().err.startswith(f"{capture.TARGET_SAYS}argument --block: expected one of")


def test_nsys_s_result_becomes_the_table(tmp_path, capsys, tools, known_rates) -> None:
    job = capture.Job(SMALL[0], "train", 2, 16, "fp32", "cpu", "auto", 0)
    capture.capture(job, None, ranges.nvtx, contextlib.nullcontext).write(tmp_path / "made.json")
    nsys_export(tmp_path / "made.sqlite")
    tools(
        "nsys",
        f"folder = {str(tmp_path)!r}\n"
        "import shutil\n"
        "if sys.argv[1] == 'export':\n"
        "    shutil.copy(folder + '/made.sqlite', sys.argv[sys.argv.index('--output') + 1])\n"
        "else:\n"
        "    shutil.copy(folder + '/made.json', sys.argv[-2])\n",
    )
    code, _, error = call(capsys, *SMALL, "--tool", "nsys", "--out", tmp_path / "out")
    assert code == 0, error
    first, second = json.loads((tmp_path / "out" / "kernels.json").read_text())["kernels"]
    assert (first["op"], first["call"], first["registers"], second["call"]) == ("conv3x3_fprop", 0, 168, None)
    assert first["gb_per_s"] == pytest.approx(first["bytes_min"] / 3e-7 / 1e9)


def test_ncu_s_result_becomes_the_table(tmp_path, capsys, tools, known_rates) -> None:
    """The whole way with an ncu that profiles nothing: its page has the ranges that the real calls had."""
    job = capture.Job(SMALL[0], "train", 2, 16, "fp32", "cpu", "auto", 0)
    found = capture.capture(job, None, ranges.nvtx, contextlib.nullcontext)
    place = next(c for c in found.calls if c.block == "layer1.0" and c.op == "conv3x3_bprop")
    (tmp_path / "page.csv").write_text(
        raw_page({NVTX: nvtx_field("layer1.0 backward", f"conv3x3_bprop #{place.index}")}, {NVTX: ""})
    )
    found.write(tmp_path / "made.json")
    tools(
        "ncu",
        f"folder = {str(tmp_path)!r}\n"
        "import pathlib, shutil\n"
        "if '--import' in sys.argv:\n"
        "    print(pathlib.Path(folder, 'page.csv').read_text())\n"
        "else:\n"
        "    shutil.copy(folder + '/made.json', sys.argv[-2])\n",
    )
    out = tmp_path / "out"
    options = ("--tool", "ncu", "--block", "layer1.0", "--out", out)
    code, text, error = call(capsys, *SMALL, *options)
    assert code == 0, error
    assert text.startswith(f"{tmp_path / 'bin' / 'ncu'} --profile-from-start off")
    (row,) = json.loads((out / "kernels.json").read_text())["kernels"]
    assert all(value is not None for value in row.values()), row
    assert (row["op"], row["block"], row["phase"], row["call"]) == (
        "conv3x3_bprop", "layer1.0", "backward", place.index,
    )  # fmt: skip
    assert row["bytes_ratio"] == pytest.approx(8e7 / place.bytes)
    assert row["limiting_factor"] == "DRAM 83%"
    assert "DRAM 83%" in text
    assert (out / "ncu.csv").exists()


def test_a_capture_is_written_and_read_back(tmp_path, known_rates) -> None:
    job = capture.Job(SMALL[0], "infer", 2, 16, "fp32", "cpu", "auto", 0)
    found = capture.capture(job, "fc", ranges.nvtx, contextlib.nullcontext)
    found.write(tmp_path / "calls.json")
    assert capture.Capture.read(tmp_path / "calls.json") == found
    assert found.step_s > 0
    assert {c.op for c in found.calls} >= {"conv3x3_infer"}


# --- on a GPU ---------------------------------------------------------------------------------------------------------

ON_GPU = ("resnet_fused.models:cifar_resnet20", "--size", "32", "--batch", "64", "--dtype", "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_torch_places_the_kernels_of_a_gpu(tmp_path, capsys, mode) -> None:
    code, text, error = call(capsys, *ON_GPU, "--mode", mode, "--out", tmp_path, "--json")
    assert code == 0, error
    kernels = json.loads(text)["kernels"]
    calls = capture_calls(kernels)
    assert {k["phase"] for k in kernels} >= ({"forward", "backward"} if mode == "train" else {"forward"})
    assert sum(op.endswith("infer" if mode == "infer" else "fprop") for op in calls.values()) >= 18
    inside = sum(k["time_us"] for k in kernels if k["call"] is not None)
    assert inside > 0.5 * sum(k["time_us"] for k in kernels)
    assert all(k["registers"] for k in kernels if k["call"] is not None and not k["kernel"].startswith("Mem"))


@pytest.mark.gpu
def test_ncu_fills_every_column_of_a_block_s_ops(tmp_path, capsys) -> None:
    if shutil.which("ncu") is None:
        pytest.skip("needs ncu on PATH")
    code, text, error = call(capsys, *ON_GPU, "--tool", "ncu", "--block", "layer2.0", "--out", tmp_path, "--json")
    if code == 3 and "ERR_NVGPUCTRPERM" in error:
        pytest.skip("needs permission to read the GPU's counters")
    assert code == 0, error
    kernels = json.loads(text)["kernels"]
    assert {k["block"] for k in kernels} == {"layer2.0"}
    assert {k["phase"] for k in kernels} == {"forward", "backward"}
    assert {"conv3x3_fprop", "conv3x3_bprop"} <= set(capture_calls(kernels).values())
    for kernel in kernels:
        if kernel["call"] is not None:
            assert all(value is not None for value in kernel.values()), kernel


def capture_calls(kernels: list[dict]) -> dict[int, str]:
    """The ops of the calls that launched kernels."""
    return {k["call"]: k["op"] for k in kernels if k["call"] is not None}
