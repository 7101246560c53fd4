"""Layers where torch captures operators: compiled, exported, traced, in ONNX."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from support import LAYERS, STEPS, Case, assert_near, data, evaluate, layered, ours, run_python
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastrnn
from fastrnn import dispatch
from fastrnn.cells import CELLS
from fastrnn.dispatch import load_backend

MODES = list(LAYERS)
F32 = torch.float32
ANY_SIZE = {k: torch.export.Dim(n, min=2, max=1000) for k, n in enumerate(("time", "batch"))}

needs_dynamo_exporter = pytest.mark.skipif(
    importlib.util.find_spec("onnxscript") is None or not hasattr(torch.onnx, "ops"),
    reason="needs onnxscript, and torch 2.8",
)

pytestmark = [
    pytest.mark.contract,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def forget_compiled_graphs() -> None:
    torch._dynamo.reset()


def model(mode: str, **options: Any) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = LAYERS[mode][0](3, 4, num_layers=2, bidirectional=True, **options)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            output, final = self.layers(x)
            return self.head(output) + sum(s.sum() for s in tree_leaves(final))

    return Model()


def gradients(m: nn.Module, run: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])]


def assert_close(actual: Any, expected: Any) -> None:
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


class Calls(TorchDispatchMode):
    """The fastrnn operators that are called in the block, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fastrnn":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))

    def check(self) -> None:
        """``opcheck`` of every call."""
        for op, args in self.calls:
            # The backward pass has no derivative to check.
            first = op._opname == "layer"
            leaves = tree_map_only(
                Tensor,
                lambda t, f=first: t.detach().requires_grad_(f and t.is_floating_point()),
                args,
            )
            torch.library.opcheck(op, leaves)


SIZES = ((5, 2), (7, 3), (9, 1))


@pytest.mark.parametrize(
    "mode,backend,dynamic",
    [
        *((mode, None, True) for mode in ("RNN_TANH", "LSTM", "GRU")),
        *(("LSTM", backend, True) for backend in layered()[1:]),
        ("LSTM", None, False),
    ],
)
def test_a_whole_graph_is_compiled(mode: str, backend: str | None, dynamic: bool) -> None:
    m = model(mode)
    compiled = torch.compile(m, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    # A size that is new to the graph, and a batch of one, which a compiler treats apart.
    for T, B in SIZES if mode == "LSTM" else SIZES[:2]:
        x = torch.randn(T, B, 3)
        with fastrnn.use_backend(backend):
            assert_close(gradients(m, compiled, x), gradients(m, m, x))
    with fastrnn.use_backend(backend), torch.no_grad():
        assert_close(compiled(x), m(x))


@pytest.mark.parametrize("mode", ["LSTM", pytest.param("GRU", marks=pytest.mark.heavy)])
def test_inductor(mode: str) -> None:
    m, x = model(mode, batch_first=True, dropout=0.5).eval(), torch.randn(5, 2, 3)
    compiled = torch.compile(m, fullgraph=True)
    assert_close(gradients(m, compiled, x), gradients(m, m, x))
    with torch.no_grad():
        assert_close(compiled(x), m(x))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="torch 2.6's compiler does not know whether autocast is available",
)
@pytest.mark.parametrize(
    "mode,autocast",
    [
        ("LSTM", True),
        ("LSTM", False),
        ("GRU", False),
        *(pytest.param(mode, True, marks=pytest.mark.heavy) for mode in MODES if mode != "LSTM"),
    ],
)
def test_compile_with_state_dropout_bf16(mode: str, autocast: bool) -> None:
    """An initial state, dropout and bfloat16: the same numbers as in eager mode."""
    m = LAYERS[mode][0](3, 4, 2, dropout=0.5)
    x, state = torch.randn(5, 2, 3), torch.randn(2, 2, 4)
    if not autocast:
        m, x, state = m.bfloat16(), x.bfloat16(), state.bfloat16()

    def run(x: Tensor, state: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, final = m(x, (state, state) if mode == "LSTM" else state)
        return output + tree_leaves(final)[0].sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    for each in run, compiled:
        torch.manual_seed(1)
        found.append(gradients(m, lambda x, each=each: each(x, state), x))
    assert found[0][0].dtype is torch.bfloat16
    assert_close(found[1], found[0])


def backends_in(graph: torch.fx.Graph) -> list[Any]:
    """The backends of the layers in a graph."""
    layer = torch.ops.fastrnn.layer
    return [n.args[0] for n in graph.nodes if n.target in (layer, layer.default)]


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch, automatic: None) -> Iterator[None]:
    """No C++ and no Numba, so that the automatic choice is torch's own operator."""
    remembered = dispatch.sizes_matter, dispatch._select_cached
    with monkeypatch.context() as without:
        for name in ("cpp", "numba"):
            without.setattr(load_backend(name), "missing", lambda: "not here")
        for function in remembered:
            function.cache_clear()
        yield
    for function in remembered:
        function.cache_clear()


def test_a_graph_has_layers_where_torchs_operators_run(without_kernels: None) -> None:
    m, x = model("LSTM"), torch.randn(5, 2, 3)
    chosen = fastrnn.explain(m.layers, x)
    assert chosen.backend == "torch"
    assert chosen.reason.endswith("; under torch.compile or torch.export: reference")
    expected = gradients(m, m, x)
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(backends_in(graph.graph))
        return graph

    compiled = torch.compile(m, fullgraph=True, backend=backend)
    assert_close(gradients(m, compiled, x), expected)
    assert seen == ["reference"] * 2
    program = torch.export.export(m, (x,), dynamic_shapes=(ANY_SIZE,))
    assert backends_in(program.graph) == ["reference"] * 2
    x = torch.randn(9, 4, 3)
    assert_close(program.module()(x), m(x))
    # A trace keeps torch's operator, which is faster.
    traced = torch.jit.trace(m, (x,))
    assert_close(traced(x[:4]), m(x[:4]))
    assert "fastrnn::layer" not in str(traced.inlined_graph)


def test_torchs_operators_are_not_compiled() -> None:
    m, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    message = "'torch' was selected and cannot run: compilers and torch.export"
    with fastrnn.use_backend("torch"):
        assert fastrnn.explain(m, x).reason.endswith("torch.compile or torch.export: an error")
        for fullgraph in (False, True):
            torch._dynamo.reset()
            with pytest.raises(Exception, match=message):
                torch.compile(m, fullgraph=fullgraph, backend="eager")(x)
        with pytest.raises(Exception, match=message):
            torch.export.export(m, (x,))
        assert_close(torch.jit.trace(m, (x,))(x), m(x))


def test_sizes_that_change_compile_once() -> None:
    m = model("LSTM")
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(m, fullgraph=True, dynamic=True, backend=counter)
    for T, B in ((5, 2), (7, 3), (9, 4)):
        compiled(torch.randn(T, B, 3))
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM", "GRU"])
def test_cells_are_compiled(mode: str) -> None:
    cell = STEPS[mode][0](3, 4)

    def run(x: Tensor) -> Tensor:
        state = None
        for each in x:
            state = cell(each, state)
        return torch.cat(tree_leaves(state))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 3)
    assert_close(gradients(cell, compiled, x), gradients(cell, run, x))


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="torch 2.6's compiler does not know whether autocast is available",
)
@pytest.mark.parametrize("name", ["grad", "jvp", "vmap"])
def test_transforms_are_compiled(name: str) -> None:
    m, x = fastrnn.GRU(3, 4), torch.randn(2, 2, 3)  # of a few steps, which the graph unrolls

    def f(x: Tensor) -> Tensor:
        return m(x)[0].square().sum()

    def run(x: Tensor) -> Any:
        if name == "vmap":
            return torch.func.vmap(f)(x[None])
        return torch.func.grad(f)(x) if name == "grad" else torch.func.jvp(f, (x,), (x,))[1]

    assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


@pytest.mark.parametrize("packed", [False, True])
def test_lengths_break_the_graph_and_are_right(packed: bool) -> None:
    """The graph breaks once, whatever the lengths."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = fastrnn.GRU(3, 4)

        def forward(self, x: Tensor, lengths: Any) -> Tensor:
            if packed:
                return self.gru(PackedSequence(x.flatten(0, 1)[:7], lengths))[0].data.exp()
            return self.gru(x.sin(), lengths=lengths)[0].exp()

    m, counter = Model(), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(m, backend=counter)
    for lengths in ([5, 0, 2], [1, 3, 4], [2, 2, 2]):
        n = torch.tensor([3, 3, 1]) if packed else lengths
        x = torch.randn(5, 3, 3)
        assert_close(
            gradients(m, lambda x, n=n: compiled(x, n), x), gradients(m, lambda x, n=n: m(x, n), x)
        )
    assert counter.frame_count == 2
    # torch 2.6 names the function instead of the reason.
    message = "with padded inputs and without lengths|run_outside_graph|PackedSequence"
    with pytest.raises(Exception, match=message):
        torch.compile(m, backend="eager", fullgraph=True)(x, n)


@pytest.mark.parametrize(
    "mode,strict", [("RNN_TANH", False), ("GRU", False), ("LSTM", False), ("LSTM", True)]
)
def test_export_with_any_length_and_batch(mode: str, strict: bool) -> None:
    m, x = model(mode), torch.randn(5, 2, 3)
    program = torch.export.export(m, (x,), dynamic_shapes=(ANY_SIZE,), strict=strict)
    for T, B in ((9, 7), (2, 2), (300, 3)):
        x = torch.randn(T, B, 3)
        assert_close(program.module()(x), m(x))


def test_an_exported_program_runs_in_another_process(tmp_path: Any) -> None:
    m, x = model("LSTM"), torch.randn(5, 2, 3)
    torch.export.save(torch.export.export(m, (x,)), tmp_path / "model.pt2")
    torch.save((x, m(x).detach()), tmp_path / "data.pt")
    code = """
        import torch, fastrnn
        x, expected = torch.load("data.pt")
        torch.testing.assert_close(torch.export.load("model.pt2").module()(x), expected)
    """
    run = run_python(code, tmp_path)
    assert run.returncode == 0, run.stderr


@pytest.mark.heavy
@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="this torch does not report that it exports"
)
def test_an_exported_program_is_compiled_ahead_of_time(tmp_path: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model("LSTM", bias=False, batch_first=True)
            self.cell = fastrnn.GRUCell(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(self.layers(x)[:, -1])

    m, dim = Model(), torch.export.Dim
    shapes = {0: dim("batch", min=2, max=1000), 1: dim("time", min=2, max=1000)}
    program = torch.export.export(m, (torch.randn(2, 5, 3),), dynamic_shapes=(shapes,))
    file = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/model.pt2")
    run = torch._inductor.aoti_load_package(file)
    for T, B in SIZES[:2]:
        x = torch.randn(B, T, 3)
        assert_close(run(x), m(x).detach())


@pytest.mark.parametrize("mode", MODES)
def test_a_trace(mode: str) -> None:
    m, x = model(mode), torch.randn(5, 2, 3)
    traced = torch.jit.trace(m, (x,))
    for T, B in SIZES:
        x = torch.randn(T, B, 3)
        assert_close(gradients(m, traced, x), gradients(m, m, x))


@pytest.mark.parametrize(
    "backend,mode,dtype",
    [
        *((layered()[0], mode, F32) for mode in MODES if mode != "LSTM"),
        *(product(layered(), ["LSTM"], [F32, torch.bfloat16, torch.float16])),
    ],
)
@pytest.mark.parametrize("step", [False, True], ids=["layer", "cell"])
def test_a_trace_has_the_state(backend: str, step: bool, mode: str, dtype: torch.dtype) -> None:
    if why := load_backend(backend).refuses(CELLS[mode], dtype, torch.device("cpu")):
        pytest.skip(why)
    m = (STEPS if step else LAYERS)[mode][0](3, 4, dtype=dtype)

    def run(f: Any, state: Any, x: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in tree_leaves(f(x, state))])

    traced: Any = None
    for T, B in SIZES:
        x, h = torch.randn(T, B, 3, dtype=dtype), torch.randn(1, B, 4, dtype=dtype)
        if step:
            x, h = x[0], h[0]
        state = (h, h / 2) if mode == "LSTM" else h
        with fastrnn.use_backend(backend):
            traced = traced or torch.jit.trace(m, (x, state))
            found, expected = (gradients(m, partial(run, f, state), x) for f in (traced, m))
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)


def test_a_trace_refuses_what_the_module_would() -> None:
    """A trace leaves out the module's checks. A layer is not a cell's step, nor a cell a layer."""
    layer = torch.jit.trace(fastrnn.GRU(3, 4), (torch.randn(5, 2, 3),))
    cell = torch.jit.trace(fastrnn.GRUCell(3, 4), (torch.randn(2, 3),))
    for f, sizes, message in (
        (layer, (5, 3), "input of 3 dimensions, as captured, got 2"),
        (layer, (2, 5, 2, 3), "got 4"),
        (layer, (0, 2, 3), "sequence length to be larger than 0"),
        (layer, (5, 2, 4), "expected"),
        (cell, (5, 2, 3), "got 4"),
        (cell, (3,), "got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            f(torch.randn(sizes))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", ["trace", "export"])
def test_constants_of_a_capture_are_refused(way: str, packed: bool) -> None:
    """The example's lengths would hold for all calls. Only a trace can read a packed batch's."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = fastrnn.GRU(3, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            if not packed:
                return self.gru(x, lengths=lengths)[0]
            return self.gru(pack_padded_sequence(x, lengths))[0].data

    m, x, lengths = Model(), torch.randn(5, 2, 3), torch.tensor([5, 3])
    if way == "trace" and packed:
        traced = torch.jit.trace(m, (x, lengths))
        lengths = torch.tensor([4, 4])
        assert_close(traced(x, lengths), m(x, lengths))
        return
    if way == "export" and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this torch does not report that it exports")
    record = torch.jit.trace if way == "trace" else torch.export.export
    with pytest.raises(RuntimeError, match=rf"torch\.(jit\.)?{way}: expected .* without lengths"):
        record(m, (x, lengths))


def test_a_graph_of_fx_has_a_layer_as_a_leaf() -> None:
    """As with torch.nn, though fx traces into the modules of other packages."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(fastrnn.LSTM(3, 4, batch_first=True))
            self.gru, self.cell = fastrnn.GRU(4, 4), fastrnn.LSTMCell(4, 5)

        def forward(self, x: Tensor, n: Tensor) -> Any:
            y, (h, _) = self.inner[0](x)
            y, _ = self.gru(y.transpose(0, 1), h, lengths=n)
            return self.cell(y[-1])

    m = Model()
    graph = torch.fx.symbolic_trace(m)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert targets == ["inner.0", "gru", "cell"]
    for B, T, n in ((2, 5, [5, 3]), (3, 4, [0, 4, 1])):
        x = torch.randn(B, T, 3)
        assert_close(graph(x, torch.tensor(n)), m(x, torch.tensor(n)))


def test_a_leaf_with_code_of_its_own_is_refused() -> None:
    class Twice(fastrnn.GRU):
        def forward(self, input: Any, *args: Any) -> Any:  # type: ignore[override]
            return super().forward(2 * input, *args)

    with_hook = fastrnn.GRU(3, 4)
    with_hook.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    for m in nn.Sequential(Twice(3, 4)), nn.Sequential(with_hook), fastrnn.GRU(3, 4):
        with pytest.raises(RuntimeError, match=r"torch\.fx: expected a (GRU|Twice) inside a model"):
            torch.fx.symbolic_trace(m)

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, fastrnn.RNNBase) or super().is_leaf_module(m, name)

    m, x = nn.Sequential(with_hook), torch.randn(5, 2, 3)
    assert_close(torch.fx.GraphModule(m, Leaves().trace(m))(x), m(x))


onnx_export = pytest.mark.filterwarnings(
    "ignore:Exporting a model to ONNX with a batch_size:UserWarning",
    "ignore:.*:FutureWarning",
    "ignore:# 'dynamic_axes' is not recommended:UserWarning",
)


def exporters(traced: list[str], compiled: list[str]) -> pytest.MarkDecorator:
    """Cells for the exporter that traces, which writes torch's own operators, and for the other."""
    modes = [(mode, False) for mode in traced]
    modes += [pytest.param(mode, True, marks=needs_dynamo_exporter) for mode in compiled]
    return pytest.mark.parametrize("mode,dynamo", modes)


def exported(m: nn.Module, x: Tensor, dynamo: bool) -> Any:
    """The model's ONNX operators, and an onnxruntime session, for any length and batch."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    file, axes = io.BytesIO(), {0: "time", 1: "batch"} if x.dim() == 3 else {0: "batch"}
    sizes: Any = {"dynamic_axes": {"x": axes}}
    if dynamo:
        sizes = {"dynamic_shapes": ({k: torch.export.Dim.DYNAMIC for k in axes},), "verbose": False}
    torch.onnx.export(m, (x,), file, input_names=["x"], dynamo=dynamo, **sizes)
    nodes = onnx.load_from_string(file.getvalue()).graph.node
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return [node.op_type for node in nodes], session


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_a_packed_batch() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastrnn.LSTM(3, 4)

        def forward(self, rows: Tensor, batch_sizes: Tensor) -> Tensor:
            return self.lstm(PackedSequence(rows, batch_sizes))[0].data

    m = Model()
    traced = torch.jit.trace(m, (torch.randn(5, 3), torch.tensor([2, 2, 1])))
    other = torch.randn(7, 3), torch.tensor([3, 2, 1, 1])
    assert_close(traced(*other), m(*other))


@onnx_export
@exporters(MODES, ["RNN_RELU", "GRU", "LSTM"])
def test_onnx_has_the_operator_itself(mode: str, dynamo: bool) -> None:
    """Written by the exporter that traces and by the one that compiles, run by onnxruntime."""
    m = model(mode, bias=mode != "RNN_RELU").eval()
    operators, session = exported(m, torch.randn(5, 2, 3), dynamo)
    assert operators.count(mode.split("_")[0]) == 2 and not {"Loop", "Scan"} & {*operators}
    for T, B in SIZES:
        x = torch.randn(T, B, 3)
        (y,) = session.run(None, {"x": x.numpy()})
        assert_close(torch.from_numpy(y), m(x).detach())


@onnx_export
@needs_dynamo_exporter
@pytest.mark.parametrize("mode", ["LSTM", pytest.param("GRU", marks=pytest.mark.heavy)])
def test_onnx_has_the_layout_and_the_state(mode: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = LAYERS[mode][0](3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            h = x[:, :4, 0].t().unsqueeze(2) * torch.ones(4)
            return self.layers(x, (h[:1], h[1:2]) if mode == "LSTM" else h[:1])

    m = Model().eval()
    _, session = exported(m, torch.randn(2, 5, 3), True)
    x = torch.randn(3, 7, 3)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(list(map(torch.from_numpy, found)), tree_leaves(m(x)))


@onnx_export
@exporters(MODES, ["GRU", "LSTM"])
def test_onnx_has_a_cell_as_one_step(mode: str, dynamo: bool) -> None:
    """The exporter that traces writes products and gates instead, as for torch.nn."""
    m = STEPS[mode][0](3, 4)
    operators, session = exported(m, torch.randn(2, 3), dynamo)
    assert operators.count(mode.split("_")[0]) == dynamo
    x = torch.randn(7, 3)
    assert_close(
        list(map(torch.from_numpy, session.run(None, {"x": x.numpy()}))), tree_leaves(m(x))
    )


@onnx_export
@pytest.mark.parametrize(
    "what,dynamo",
    [
        ("packed", False),
        ("lengths", False),
        ("projected", False),
        pytest.param("packed", True, marks=needs_dynamo_exporter),
        pytest.param("lengths", True, marks=needs_dynamo_exporter),
        pytest.param("projected", True, marks=needs_dynamo_exporter),
    ],
)
def test_onnx_refuses(what: str, dynamo: bool) -> None:
    """Layers that ONNX's operators cannot express."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastrnn.LSTM(3, 4, proj_size=2 if what == "projected" else 0)

        def forward(self, x: Tensor) -> Any:
            if what == "packed":
                return self.lstm(pack_padded_sequence(x, torch.tensor([5, 3])))[0].data
            return self.lstm(x, lengths=[5, 3] if what == "lengths" else None)[0]

    message = "projections" if what == "projected" else "expected a padded input"
    with pytest.raises(Exception, match=message):
        exported(Model(), torch.randn(5, 2, 3), dynamo)


@pytest.mark.parametrize("mode", MODES)
def test_fake_tensors_and_make_fx(mode: str) -> None:
    m, x = LAYERS[mode][0](3, 4), torch.randn(5, 2, 3)
    expected = m(x)
    assert_close(make_fx(lambda x: m(x))(x)(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        found = m(fake.from_tensor(x))
    for a, e in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


def test_a_capture_without_gradients_reports_it() -> None:
    m, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad():
        recorded = make_fx(lambda x: m(x)[0])(x)
    with pytest.raises(RuntimeError, match="captured without gradients"):
        recorded(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_capture_has_no_forward_mode(frozen: bool) -> None:
    """An error, and not the zero tangent of an operator without a rule."""
    m, x = fastrnn.LSTM(3, 4).requires_grad_(not frozen), torch.randn(5, 2, 3)
    for recorded in (torch.jit.trace(m, (x,)), torch.export.export(m, (x,)).module()):
        with pytest.raises(RuntimeError, match="does not support forward-mode AD"):
            torch.func.jvp(lambda x: recorded(x)[0], (x,), (x,))  # noqa: B023


@pytest.mark.parametrize(
    "cls,backend",
    [
        *((fastrnn.LSTMCell, backend) for backend in layered()),
        *((cls, layered()[0]) for cls in (fastrnn.GRUCell, fastrnn.RNNCell)),
    ],
)
def test_the_operator_of_a_step(cls: Any, backend: str) -> None:
    m, x = cls(3, 4), torch.randn(2, 3)
    for context in (torch.no_grad, torch.enable_grad):
        with fastrnn.use_backend(backend), Calls() as seen, context():
            m(x)
        ((op, args),) = seen.calls
        with context():
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_a_mode_sees_one_operator_a_layer() -> None:
    m, x = fastrnn.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    with Calls() as seen:
        output = m(x)[0]
        (dx,) = torch.autograd.grad(output.sum(), m.weight_ih_l0, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward through a captured"):
            dx.sum().backward()
    assert [op._opname for op, _ in seen.calls] == 2 * ["layer"] + 2 * ["layer_backward"]


CHECKED = [
    Case(mode, directions=2, bias=bias, layout=layout, projected=projected, hx=hx)
    for mode, bias, layout, projected, hx in (
        ("RNN_TANH", True, "dense", False, True),
        ("RNN_RELU", False, "unsorted", False, False),
        ("LSTM", True, "dense", True, True),
        ("LSTM", False, "unsorted", False, True),
        ("GRU", True, "dense", False, False),
    )
]


# Every case on one backend; one case on every backend, whose saved activations differ in shape and
# dtype.
CHECKS = [
    *((case, F32, layered()[0]) for case in CHECKED),
    *((CHECKED[2], torch.float64, backend) for backend in layered()[:1]),
    *((CHECKED[2], torch.float16, backend) for backend in layered()[:1]),
    *((CHECKED[2], torch.bfloat16, backend) for backend in layered()),
    *((case, F32, backend) for case in CHECKED[2:4] for backend in layered()[1:]),
]


@pytest.mark.parametrize("case,dtype,backend", CHECKS, ids=str)
def test_operators_are_what_torch_expects(case: Case, dtype: torch.dtype, backend: str) -> None:
    """``opcheck`` of every operator call of a layer, forward and backward."""
    if why := load_backend(backend).refuses(case.cell, dtype, torch.device("cpu")):
        pytest.skip(why)
    d, m = data(case, dtype), ours(case, dtype)
    expected = evaluate(m, case, d, backend)
    with Calls() as seen:
        # The same computation twice, so 16 bits agree as closely as 32.
        near = F32 if dtype.itemsize == 2 else dtype
        assert_near(evaluate(m, case, d, backend), expected, near)
    assert [op._opname for op, _ in seen.calls] == ["layer", "layer_backward"]
    seen.check()


def test_a_compiler_sees_bad_input() -> None:
    m = fastrnn.GRU(3, 4)
    compiled = torch.compile(m, backend="aot_eager")
    for x, message in (
        (torch.randn(5, 2, 4), "input_size"),
        (torch.randn(5), "2D or 3D"),
        (torch.randn(0, 2, 3), "sequence length"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(x)
