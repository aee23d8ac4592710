"""Which backend runs an op: forcing, the environment, fallbacks, isolation, and that nothing else names a backend."""

from __future__ import annotations

import ast
import contextvars
import dataclasses
import logging
import threading
from pathlib import Path

import pytest
import torch
from cases import BLOCKS
from helpers import assert_close, block_input, pair, randn

import resnet_fused
from resnet_fused import backends, config
from resnet_fused.ops._op import ops

FPROP = torch.ones(1, 1, 3, 3), None, None, None, torch.ones(1, 1, 3, 3), 1, 1, 1, True
ROOT = Path(resnet_fused.__file__).parent


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No backend forced from outside; whatever a test sets is forgotten."""
    monkeypatch.delenv("RESNET_FUSED_BACKEND", raising=False)
    config.backend.cache_clear()
    yield
    config.backend.cache_clear()


def force(monkeypatch, name: str) -> None:
    monkeypatch.setenv("RESNET_FUSED_BACKEND", name)
    config.backend.cache_clear()


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """(op, backend) of every implementation that runs."""
    seen: list[tuple[str, str]] = []
    for op in backends.operations():
        for name, found in backends.implementations(op).items():

            def run(*args, op=op, name=name, found=found):
                seen.append((op, name))
                return found.run(*args)

            spy = dataclasses.replace(found, run=run, consume=None)
            monkeypatch.setitem(backends.implementations(op), name, spy)
    return seen


def fake(name: str, run, unsupported_reason) -> backends.Implementation:
    """An implementation that is chosen by default."""
    model = backends.implementations("bn_statistics")["reference"]
    return dataclasses.replace(model, backend=name, run=run, unsupported_reason=unsupported_reason)


# --- forcing --------------------------------------------------------------------------------------------------------


def test_the_reference_supports_everything():
    for op in backends.operations():
        found = backends.implementations(op)["reference"]
        assert found.default
        assert found.unsupported_reason is backends.always, op


def test_names_are_those_of_the_configuration():
    assert config.BACKENDS == ("cuda", "triton", "aten", "reference")
    assert all(set(backends.implementations(op)) <= set(config.BACKENDS) for op in backends.operations())


@pytest.mark.parametrize("name", ["aten", "reference"])
def test_a_forced_backend_runs(calls, name):
    with backends.use_backend(name):
        ops["conv3x3_fprop"](*FPROP)
    assert calls == [("conv3x3_fprop", name)]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_that_cannot_run_raises_with_the_reason(name, calls):
    args = [a.double() if isinstance(a, torch.Tensor) else a for a in FPROP]
    reason = backends.unavailable("conv3x3_fprop", name, *args)
    assert reason
    text = f"conv3x3_fprop: expected arguments that the forced backend {name} supports, got: {reason}"
    with backends.use_backend(name), pytest.raises(NotImplementedError) as caught:
        ops["conv3x3_fprop"](*args)
    assert str(caught.value) == text
    with backends.use_backend(name), pytest.raises(NotImplementedError) as caught:
        torch.ops.resnet_fused.conv3x3_fprop(*args)
    assert str(caught.value) == text
    assert calls == []


def test_a_predicates_reason_is_the_text_of_the_error(monkeypatch):
    def never(*args):
        return "the moon is full"

    monkeypatch.setitem(backends.implementations("bn_statistics"), "triton", fake("triton", never, never))
    assert backends.unavailable("bn_statistics", "triton", FPROP[0]) == "the moon is full"
    with backends.use_backend("triton"), pytest.raises(NotImplementedError, match="the moon is full"):
        ops["bn_statistics"](FPROP[0])


def test_wrong_arguments_are_refused_before_the_backend_is_asked():
    with backends.use_backend("triton"), pytest.raises(ValueError, match="stride >= 1"):
        ops["conv3x3_fprop"](*FPROP[:5], 0, 1, 1, True)


def test_contexts_nest_and_restore():
    assert backends.forced() == "auto"
    with backends.use_backend("aten"):
        assert backends.forced() == "aten"
        with backends.use_backend("auto"):
            assert backends.forced() == "auto"
            with backends.use_backend("reference"):
                assert backends.forced() == "reference"
            assert backends.forced() == "auto"
        assert backends.forced() == "aten"
        with pytest.raises(KeyError), backends.use_backend("reference"):
            raise KeyError
        assert backends.forced() == "aten"
    assert backends.forced() == "auto"


@pytest.mark.parametrize("name", ["Aten", "", "cudnn", "aten,cudnn", "aten,", "aten,aten", "auto,aten", None])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"use_backend: expected one of auto, cuda, triton, aten, reference, or "):
        with backends.use_backend(name):
            pass
    with pytest.raises(ValueError, match="register: expected one of cuda, triton, aten, reference, got "):
        backends.register("nothing", name, print)
    assert backends.implementations("nothing") == {}


def test_a_backend_is_registered_alone():
    with pytest.raises(ValueError, match="register: expected one of cuda, triton, aten, reference, got 'cuda,aten'"):
        backends.register("nothing", "cuda,aten", print)


def test_public_name():
    assert resnet_fused.use_backend is backends.use_backend


# --- environment ----------------------------------------------------------------------------------------------------


def test_the_environment_forces(monkeypatch, calls):
    force(monkeypatch, "reference")
    ops["conv3x3_fprop"](*FPROP)
    with backends.use_backend("aten"):
        ops["conv3x3_fprop"](*FPROP)
    with backends.use_backend("auto"):
        ops["conv3x3_fprop"](*FPROP)
    assert [name for _, name in calls] == ["reference", "aten", "aten"]


@pytest.mark.parametrize("value", ["cudnn", "", "REFERENCE"])
def test_an_unknown_value_in_the_environment_raises(monkeypatch, value):
    force(monkeypatch, value)
    with pytest.raises(ValueError, match=f"RESNET_FUSED_BACKEND: expected one of auto, .*, got '{value}'"):
        ops["conv3x3_fprop"](*FPROP)


# --- choice and fallback --------------------------------------------------------------------------------------------


def test_the_first_that_supports_the_arguments_is_chosen(monkeypatch, calls):
    ops["conv3x3_fprop"](*FPROP)
    found = backends.implementations("conv3x3_fprop")
    monkeypatch.setitem(found, "aten", fake("aten", print, lambda *_: "not today"))
    ops["conv3x3_fprop"](*FPROP)
    assert [name for _, name in calls] == ["aten", "reference"]


def test_a_backend_that_is_not_default_is_only_run_when_forced(monkeypatch):
    ran = []
    table: dict = {}
    monkeypatch.setitem(backends._table, "spare", table)
    backends.register("spare", "cuda", lambda: ran.append("cuda"), default=False)
    backends.register("spare", "reference", lambda: ran.append("reference"))
    assert backends.choose("spare") is table["reference"]
    with backends.use_backend("cuda"):
        assert backends.choose("spare") is table["cuda"]
    monkeypatch.delitem(table, "reference")
    with pytest.raises(NotImplementedError, match="spare: expected arguments that some backend supports, got none"):
        backends.choose("spare")


def test_no_kernel_that_a_gpu_has_not_run_is_default():
    found = [backends.implementations(op).get(name) for op in backends.operations() for name in ("cuda", "triton")]
    registered = [f for f in found if f is not None]
    assert len(registered) > 20
    assert not any(f.default for f in registered)


def test_of_several_the_first_that_supports_the_arguments_runs(monkeypatch):
    table: dict = {}
    monkeypatch.setitem(backends._table, "spare", table)
    backends.register("spare", "cuda", print, lambda n: "too large" if n > 1 else None, default=False)
    backends.register("spare", "triton", print, lambda n: "too large" if n > 2 else None, default=False)
    backends.register("spare", "aten", print)
    chosen = {}
    for names in ("cuda,triton,aten", "triton,cuda", "aten,cuda"):
        with backends.use_backend(names):
            chosen[names] = [backends.choose("spare", n).backend for n in (1, 2)]
    assert chosen == {
        "cuda,triton,aten": ["cuda", "triton"],
        "triton,cuda": ["triton", "triton"],
        "aten,cuda": ["aten", "aten"],
    }
    with backends.use_backend("triton,cuda"), pytest.raises(NotImplementedError) as caught:
        backends.choose("spare", 3)
    assert str(caught.value) == (
        "spare: expected arguments that one of the forced backends triton,cuda supports, got none that does"
    )


def test_of_several_one_that_is_slower_runs_only_where_nothing_else_is_left(monkeypatch):
    table: dict = {}
    monkeypatch.setitem(backends._table, "spare", table)
    backends.register("spare", "cuda", print, default=False, preferred=lambda: False)
    backends.register("spare", "aten", print)
    with backends.use_backend("cuda,aten"):
        assert backends.choose("spare") is table["aten"]
    with backends.use_backend("cuda,triton"):
        assert backends.choose("spare") is table["cuda"]


def test_a_fallback_is_counted_each_time_and_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "fallbacks", type(backends.fallbacks)())
    with caplog.at_level(logging.INFO, logger="resnet_fused"):
        for _ in range(3):
            backends.note_fallback("somewhere", "of a reason")
        backends.note_fallback("somewhere", "of another")
    assert backends.fallbacks == {("somewhere", "of a reason"): 3, ("somewhere", "of another"): 1}
    assert [record.getMessage() for record in caplog.records] == [
        "somewhere: of a reason; running the next choice instead",
        "somewhere: of another; running the next choice instead",
    ]


def test_a_block_that_falls_back_says_so(caplog, monkeypatch):
    monkeypatch.setattr(backends, "fallbacks", type(backends.fallbacks)())
    block, _ = pair(BLOCKS[0], lambda channels: torch.nn.GroupNorm(1, channels))
    with caplog.at_level(logging.INFO, logger="resnet_fused"):
        block(block_input(BLOCKS[0]))
        block(block_input(BLOCKS[0]))
    assert list(backends.fallbacks.values()) == [2]
    (record,) = caplog.records
    assert "BasicBlock" in record.getMessage()
    assert "GroupNorm" in record.getMessage()


def test_an_op_that_falls_back_is_counted(monkeypatch):
    monkeypatch.setattr(backends, "fallbacks", type(backends.fallbacks)())
    table = backends.implementations("bn_statistics")
    monkeypatch.setitem(table, "triton", fake("triton", print, lambda *_: "no GPU"))
    ops["bn_statistics"](FPROP[0])
    ops["bn_statistics"](FPROP[0])
    assert backends.fallbacks == {("bn_statistics[triton]", "no GPU"): 2}


# --- isolation ------------------------------------------------------------------------------------------------------


def test_a_forced_backend_stays_in_its_thread_and_context():
    found = {}

    def look(name):
        found[name] = backends.forced()

    with backends.use_backend("reference"):
        thread = threading.Thread(target=look, args=("thread",))
        thread.start()
        thread.join()
        contextvars.Context().run(look, "empty context")
        contextvars.copy_context().run(look, "copied context")
    assert found == {"thread": "auto", "empty context": "auto", "copied context": "reference"}


@pytest.mark.parametrize("name", ["aten", "reference"])
@pytest.mark.parametrize("case", [BLOCKS[0], BLOCKS[5]], ids=lambda case: case.id)
def test_backward_runs_under_the_backend_of_forward(calls, name, case):
    """Also when it is called outside the context, or inside another one."""
    block, plain = pair(case)
    x = block_input(case)
    for outside in ("auto", "reference" if name == "aten" else "aten"):
        calls.clear()
        leaf = x.clone().requires_grad_()
        with backends.use_backend(name):
            out = block(leaf)
        with backends.use_backend(outside):
            out.sum().backward()
        conv = [backend for op, backend in calls if op.startswith("conv")]
        assert len(conv) == 2 * sum(isinstance(m, torch.nn.Conv2d) for m in block.modules())
        assert {backend for op, backend in calls if op != "bn_finalize"} >= {name}
        assert {backend for op, backend in calls if name in backends.implementations(op)} == {name}
        expected = x.clone().requires_grad_()
        plain(expected).sum().backward()
        assert_close(leaf.grad, expected.grad, 1e-10)


def test_a_backend_that_lacks_an_op_fails_the_block_rather_than_run_another():
    block, _ = pair(BLOCKS[0])
    with backends.use_backend("triton"), pytest.raises(NotImplementedError, match="forced backend triton"):
        block(block_input(BLOCKS[0]))


def test_both_backends_agree_on_a_block():
    block, plain = pair(BLOCKS[5])
    x = randn(2, 4, 4, 5)
    expected = plain(x)
    for name in ("aten", "reference"):
        with backends.use_backend(name):
            assert_close(block(x), expected, 1e-12)


# --- only the choosing code names backends --------------------------------------------------------------------------


def named_backends(path: Path) -> list[tuple[int, str]]:
    """String constants that are a backend's name, but for docstrings and for ``cuda`` next to the word ``device``.

    ``cuda`` is a device type too; it is told from the backend by the expression it stands in.
    """
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Constant) and node.value in config.BACKENDS):
            continue
        statement = parents[node]
        while not isinstance(statement, ast.stmt):
            statement = parents[statement]
        if node.value == "cuda" and "device" in ast.unparse(statement):
            continue
        found.append((node.lineno, node.value))
    return found


# The registry, the configuration, what tells users about it, and each backend's own registrations.
NAMES_BACKENDS = ("backends.py", "config.py", "report.py", "aten/", "cuda/", "kernels/", "tuning/", "cli/")


def test_only_the_choosing_code_names_backends():
    """An op registers the reference, nothing else; blocks, autograd, convert and models name none.

    In graphs.py it is the device's name.
    """
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(NAMES_BACKENDS):
            continue
        allowed = {"reference"} if relative.startswith("ops/") else {"cuda"} if relative == "graphs.py" else set()
        named = [(line, name) for line, name in named_backends(path) if name not in allowed]
        assert not named, f"{relative} names backends: {named}"


def test_the_scan_finds_a_backends_name(tmp_path):
    source = tmp_path / "block.py"
    source.write_text('"""aten"""\nx = t.device.type == "cuda"\ny = use_backend("cuda")\nz = {"aten": 1}\n')
    assert named_backends(source) == [(1, "aten"), (3, "cuda"), (4, "aten")]


def test_only_the_configuration_reads_the_environment():
    for path in ROOT.rglob("*.py"):
        if path.name not in ("config.py", "extension.py") and "cli" not in path.parts:
            assert "os.environ" not in path.read_text(), path
