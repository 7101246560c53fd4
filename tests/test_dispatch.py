"""The choice of a backend: selected, automatic, explained, refused."""

from __future__ import annotations

import asyncio
import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import LAYERS, layered, run_python, run_script
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastrnn
from fastrnn import dispatch, functional
from fastrnn.backends import reference
from fastrnn.cells import GRU, LSTM
from fastrnn.dispatch import BACKENDS, BackendError, explain_choice, load_backend

CPU = torch.device("cpu")
pytestmark = [pytest.mark.installed, pytest.mark.usefixtures("automatic")]

needs_cpp = pytest.mark.skipif(load_backend("cpp").missing() is not None, reason="no extension")


def chosen(dtype: torch.dtype = torch.float32) -> str:
    return explain_choice(LSTM, dtype, CPU).backend


# use_backend


def test_every_backend_has_its_module() -> None:
    assert BACKENDS[-1] == "reference"
    for name in BACKENDS:
        module = load_backend(name)
        assert module.__name__ == f"fastrnn.backends.{name}"
        assert isinstance(module.describe() if module.missing() is None else "", str)


def test_use_backend_nests_and_restores() -> None:
    free = chosen()
    with fastrnn.use_backend("reference"):
        assert chosen() == "reference"
        with fastrnn.use_backend(None):
            assert chosen() == free
        assert chosen() == "reference"
        with fastrnn.use_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == "reference"
    assert chosen() == free


def test_use_backend_restores_after_an_exception() -> None:
    free = chosen()
    with pytest.raises(KeyError), fastrnn.use_backend("reference"):
        raise KeyError
    assert chosen() == free


def test_use_backend_decorates() -> None:
    assert fastrnn.use_backend("reference")(chosen)() == "reference"


@pytest.mark.parametrize("name", ["", "cuda", "CPP", "reference "])
def test_unknown_backend(name: str) -> None:
    m, x = fastrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"expected one of .*reference"):
        fastrnn.use_backend(name).__enter__()
    with pytest.raises(ValueError, match=r"expected one of .*reference"):
        explain_choice(LSTM, torch.float32, CPU, name)
    with pytest.raises(ValueError, match=r"expected one of .*reference"):
        functional.rnn(LSTM, x, m._weights(), backend=name)
    assert m(x) is not None


def test_another_thread_is_left_alone() -> None:
    free = chosen()
    seen: list[str] = []
    entered, checked = threading.Event(), threading.Event()

    def other() -> None:
        entered.wait(10)
        seen.append(chosen())
        checked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fastrnn.use_backend("reference"):
        entered.set()
        checked.wait(10)
    thread.join()
    assert seen == [free]


def test_another_task_is_left_alone() -> None:
    async def one(name: str | None) -> list[str]:
        seen = []
        with fastrnn.use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(chosen())
        return seen

    async def both() -> list[list[str]]:
        return await asyncio.gather(one("reference"), one(None))

    free = chosen()
    assert asyncio.run(both()) == [["reference"] * 3, [free] * 3]


# Precedence


def test_the_argument_beats_the_context_beats_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "_environment", "nonsense")
    with pytest.raises(ValueError, match=r"unknown backend 'nonsense'.*FASTRNN_BACKEND"):
        chosen()
    with fastrnn.use_backend("reference"):
        choice = explain_choice(LSTM, torch.float32, CPU)
        assert choice.backend == "reference"
        assert "use_backend" in choice.reason
        with pytest.raises(ValueError, match="other"):
            explain_choice(LSTM, torch.float32, CPU, "other")
    choice = explain_choice(LSTM, torch.float32, CPU, "reference")
    assert "argument" in choice.reason


def test_a_change_of_choice_holds_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is remembered by cell, dtype, device and selected backend, not by module."""
    calls: list[str] = []
    for name in layered():
        original = load_backend(name).forward

        def spy(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(load_backend(name), "forward", spy)
    m, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    m(x)
    with fastrnn.use_backend("reference"):
        m(x)
    m(x)
    functional.rnn(GRU, x, m._weights(), backend="reference")
    m.double()(x.double())
    free, free64 = chosen(), explain_choice(GRU, torch.float64, CPU).backend
    assert calls == [free, "reference", free, "reference", free64]


def test_environment_good() -> None:
    code = "import torch, fastrnn; m = fastrnn.LSTM(3, 4); x = torch.randn(5, 2, 3); m(x)\n"
    code += "print(fastrnn.explain(m, x))\n"
    code += "with fastrnn.use_backend(None): print(fastrnn.explain(m, x))"
    for line in run_script(code, FASTRNN_BACKEND="reference").splitlines():
        assert line.startswith("reference: selected by FASTRNN_BACKEND;"), line


WITHOUT_CPP = "import sys; sys.modules['fastrnn._cpp'] = None; import torch, fastrnn\n"


def test_environment_unrunnable() -> None:
    """A selected backend has no fallback, though the extension cannot be imported."""
    code = WITHOUT_CPP + "fastrnn.LSTM(3, 4)(torch.randn(5, 2, 3))"
    result = run_python(code, FASTRNN_BACKEND="cpp")
    assert result.returncode == 1
    assert "BackendError" in result.stderr
    assert "installed without its extension fastrnn._cpp" in result.stderr


@pytest.mark.parametrize("without,next_one", [("", "numba"), ("numba", "torch")])
def test_without_the_extension_the_next_backend_runs(without: str, next_one: str) -> None:
    code = WITHOUT_CPP + "m, x = fastrnn.LSTM(3, 4), torch.randn(5, 2, 3)\n"
    if without:
        code += "import importlib.util; importlib.util.find_spec = lambda name, *_: None\n"
    code += "print(fastrnn.explain(m, x)); m(x)[0].sum().backward(); fastrnn.GRUCell(3, 4)(x[0])"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{next_one}: automatic choice")
    assert "not cpp: fastrnn was installed without its extension fastrnn._cpp" in result.stdout
    # Once, for the line that called the layer.
    assert result.stderr.count("RuntimeWarning: fastrnn runs without its C++ backend") == 1
    assert re.search(r"^<string>:\d+: RuntimeWarning: fastrnn runs", result.stderr, re.MULTILINE)
    assert ("pip install fastrnn[numba]" in result.stderr) == bool(without)


def test_several_threads_are_warned_once() -> None:
    code = (
        WITHOUT_CPP
        + """
import threading, warnings
warnings.simplefilter("always")
m, x, ready = fastrnn.LSTM(3, 4), torch.randn(5, 2, 3), threading.Barrier(4)
threads = [threading.Thread(target=lambda: (ready.wait(), m(x))) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning: fastrnn runs without its C++ backend") == 1


def test_a_free_threaded_python_gets_the_reason() -> None:
    code = """
import sys, sysconfig, torch
known = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: 1 if name == "Py_GIL_DISABLED" else known(name)
sys.modules["fastrnn._cpp"] = None
import fastrnn
fastrnn.GRU(3, 4)(torch.randn(5, 2, 3))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "requires the GIL" in result.stderr


@pytest.mark.skipif(load_backend("numba").missing() is not None, reason="numba is not installed")
def test_torch_runs_the_sizes_at_which_it_is_faster_than_numba(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load_backend("cpp"), "_missing", "no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(
            load_backend("numba"), "broken", lambda: "numba 9.9 cannot be used: NumPy is too new"
        )
        choice = fastrnn.explain(fastrnn.GRU(3, 64), torch.randn(5, 8, 3))
        assert choice.backend == "torch" and "NumPy is too new" in choice.rejected["numba"]

    def chosen(layer: Any, *shape: int) -> str:
        return fastrnn.explain(
            layer, torch.randn(shape, dtype=next(layer.parameters()).dtype)
        ).backend

    assert chosen(fastrnn.LSTM(3, 32), 5, 16, 3) == "numba"
    assert chosen(fastrnn.LSTM(3, 32), 5, 17, 3) == "torch"
    assert chosen(fastrnn.LSTM(3, 33), 5, 1, 3) == "torch"
    assert chosen(fastrnn.LSTM(3, 64, dtype=torch.float64), 5, 9, 3) == "numba"
    assert chosen(fastrnn.LSTM(3, 64, proj_size=5), 5, 9, 3) == "numba"
    assert chosen(fastrnn.GRU(3, 64), 5, 9, 3) == "numba"
    assert chosen(fastrnn.GRU(3, 64, batch_first=True), 5, 1, 3) == "torch"
    assert chosen(fastrnn.GRU(3, 64), 1, 3) == "torch"
    assert chosen(fastrnn.GRUCell(3, 64), 9, 3) == "torch"


@needs_cpp
def test_only_what_runs_is_imported() -> None:
    code = """
import sys, torch, fastrnn
for dtype in (torch.float32, torch.bfloat16):
    m, x = fastrnn.LSTM(3, 4, dtype=dtype), torch.randn(5, 2, 3, dtype=dtype)
    m(x), fastrnn.explain(m, x)
print({"triton", "numba"} & set(sys.modules))
"""
    assert run_script(code) == "set()"


# Refusals


@needs_cpp
def test_an_explicit_choice_never_falls_back() -> None:
    m, cell = (c(3, 4, device="meta") for c in (fastrnn.LSTM, fastrnn.LSTMCell))
    x = torch.randn(5, 2, 3, device="meta")
    with fastrnn.use_backend("cpp"):
        for module, input in ((m, x), (cell, x[0])):
            for f in (module, lambda input, module=module: fastrnn.explain(module, input)):
                with pytest.raises(BackendError, match=r"'cpp'.*got meta"):
                    f(input)
    m(x)


@needs_cpp
def test_an_explicit_choice_on_another_device() -> None:
    m = fastrnn.GRU(3, 4, device="meta")
    with (
        fastrnn.use_backend("cpp"),
        pytest.raises(BackendError, match="expected tensors on the CPU, got meta"),
    ):
        m(torch.randn(5, 2, 3, device="meta"))


def fake(**changes: Any) -> SimpleNamespace:
    names = ("missing", "refuses", "describe", "forward", "backward")
    return SimpleNamespace(kind="layer", **{n: getattr(reference, n) for n in names} | changes)


def test_a_backend_that_misses_something(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = fake(missing=lambda: "a Flux capacitor")
    monkeypatch.setattr(dispatch, "BACKENDS", ("flux", "reference"))
    monkeypatch.setattr(dispatch, "load_backend", lambda n: absent if n == "flux" else reference)
    with pytest.raises(BackendError, match=r"'flux'.*a Flux capacitor"):
        fastrnn.use_backend("flux").__enter__()
    with pytest.raises(BackendError, match=r"'flux'.*a Flux capacitor"):
        explain_choice(LSTM, torch.float32, CPU, "flux")
    choice = explain_choice(LSTM, torch.float32, CPU)
    assert choice.backend == "reference"
    assert choice.rejected == {"flux": "a Flux capacitor"}
    assert str(choice).splitlines()[1] == "  not flux: a Flux capacitor"


def test_a_backend_error_is_a_runtime_error() -> None:
    assert issubclass(fastrnn.BackendError, RuntimeError)


# explain


@needs_cpp
@pytest.mark.parametrize("mode", LAYERS)
def test_explain_a_layer(mode: str) -> None:
    m = fastrnn.RNNBase(mode, 3, 4)
    choice = fastrnn.explain(m, torch.randn(5, 2, 3))
    assert choice.backend == "cpp"
    assert choice.reason.startswith("automatic choice; fused C++")
    assert choice.rejected == {}
    assert str(choice) == f"cpp: {choice.reason}"


@needs_cpp
def test_explain_a_cell_packed_input_and_other_dtypes() -> None:
    x = torch.randn(5, 2, 3)
    assert fastrnn.explain(fastrnn.GRUCell(3, 4), x[0]).backend == "cpp"
    assert fastrnn.explain(fastrnn.GRU(3, 4), pack_sequence([x[:, 0]])).backend == "cpp"
    assert fastrnn.explain(fastrnn.GRU(3, 4).bfloat16(), x.bfloat16()).backend == "cpp"
    dtype = torch.float8_e4m3fn
    choice = fastrnn.explain(fastrnn.GRU(3, 4).to(dtype), x.to(dtype))
    assert choice.backend == "torch"
    expected = f"expected a 16-bit dtype, torch.float32 or torch.float64, got {dtype}"
    assert choice.rejected["cpp"] == expected
    assert f"not cpp: {expected}" in str(choice)


def test_explain_names_the_selection() -> None:
    m, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    with fastrnn.use_backend("reference"):
        assert str(fastrnn.explain(m, x)).startswith("reference: selected by use_backend;")


@pytest.mark.parametrize("module", [torch.nn.LSTM(3, 4), torch.nn.GRUCell(3, 4), "LSTM", None])
def test_explain_takes_fastrnn_modules_only(module: Any) -> None:
    with pytest.raises(TypeError, match="of fastrnn"):
        fastrnn.explain(module, torch.randn(5, 2, 3))


def test_explain_checks_the_input_as_the_layer_does() -> None:
    m, cell = fastrnn.GRU(3, 4), fastrnn.GRUCell(3, 4)
    for wrong, module in ((torch.randn(()), m), (torch.randn(1, 1, 1, 3), m), (m.bias_ih_l0, cell)):
        with pytest.raises((ValueError, RuntimeError)) as layers:
            module(wrong)
        with pytest.raises(type(layers.value), match=re.escape(str(layers.value))):
            fastrnn.explain(module, wrong)
    for name in [n for n, _ in m.named_parameters()]:
        weight = getattr(m, name).detach()
        delattr(m, name)
        setattr(m, name, weight)
    assert fastrnn.explain(m, torch.randn(5, 2, 3)).backend in BACKENDS


@needs_cpp
@pytest.mark.isa
def test_cpp_uses_no_more_than_torch_may() -> None:
    """ATEN_CPU_CAPABILITY holds for the engine too."""
    cpp: Any = load_backend("cpp")
    allowed = {"DEFAULT": ["generic"], "AVX2": ["avx2", "generic"]}
    isa = cpp.isa()
    assert isa in cpp.describe()
    capability = torch.backends.cpu.get_cpu_capability()
    assert isa in allowed.get(capability, ["avx512", "avx2", "generic"])


@needs_cpp
def test_explain_counts_the_threads_of_now(set_threads: Any) -> None:
    m, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    for n, text in ((1, "1 thread"), (2, "2 threads")):
        set_threads(n)
        if not load_backend("cpp")._cpp.threading():
            text = "1 thread"
        assert fastrnn.explain(m, x).reason.endswith(text)


# The contract that backends share


def test_the_functions_of_a_layer_are_public() -> None:
    m, x = fastrnn.LSTM(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3)
    output, final = m(x)
    y, states = functional.rnn(LSTM, x, m._weights())
    assert torch.equal(y, output)
    for a, b in zip(states, final, strict=True):
        assert torch.equal(a, b)
    cell = fastrnn.LSTMCell(3, 4)
    new = functional.step(LSTM, x[0], None, (*cell.parameters(), None))
    for a, b in zip(cell(x[0]), new, strict=True):
        assert torch.equal(a, b)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s) for s in shapes]


def test_functional_checks_its_own_arguments() -> None:
    """Callers other than the modules get an error too, before a backend sees the sizes."""
    w = (*tensors((12, 3), (12, 4), (12,), (12,)), None)
    x = torch.randn(5, 2, 3)
    long, wide, meta = torch.randn(13, 4), torch.randn(12, 3), x.to("meta")
    for text, *args in (
        ("weight_ih of shape", torch.randn(5, 2, 9), w),
        ("3 x hidden_size rows, got 13", x, (w[0], long, *w[2:])),
        ("without projection", x, (w[0], wide, *w[2:])),
        ("bias_ih of shape", x, (*w[:2], torch.randn(4), *w[3:])),
        ("both bias_ih and bias_hh", x, (*w[:2], None, *w[3:])),
        ("cannot be projected", x, (*w[:4], torch.randn(4, 4))),
        ("dtype", x.double(), w),
        ("dtype", x, (w[0].double(), *w[1:])),
        ("device", x, (w[0].to("meta"), *w[1:])),
        ("device", meta, w),
        ("1 initial states", x, w, tensors((1, 2, 4), (1, 2, 4))),
        ("initial h of shape", x, w, tensors((1, 2, 5))),
        ("initial h of shape", x, w, tensors((1, 1, 4))),
        ("dtype", x, w, [torch.randn(1, 2, 4).double()]),
        ("device", x, w, [torch.randn(1, 2, 4, device="meta")]),
    ):
        input, weights, *hx = args
        with pytest.raises(RuntimeError, match=text):
            functional.rnn(GRU, input, [[weights]], *hx)
    large = 2**62  # the sum overflows back to the number of rows
    sizes = torch.tensor([large + 1, large + 1, large + 1, large])
    with pytest.raises(RuntimeError, match="as many packed rows"):
        functional.rnn(GRU, torch.randn(3, 3), [[w]], batch_sizes=sizes, backend="reference")
    with pytest.raises(ValueError, match="3 dimensions"):
        functional.rnn(GRU, x[0], [[w]])
    with pytest.raises(ValueError, match="2 dimensions"):
        functional.rnn(GRU, x, [[w]], batch_sizes=torch.tensor([2]))
    with pytest.raises(ValueError, match="2 dimensions"):
        functional.step(GRU, x, None, w)
