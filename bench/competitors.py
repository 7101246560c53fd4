"""The competitors: how each builds a case, and the check of its results against torch.nn."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from workloads import Case, Problem, make

import fastrnn

Run = Callable[[], Any]

# ONNX and torch order the gates differently. Position in ONNX -> gate in torch.
ONNX_GATES = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}


COMPILED_SHAPES = ("(1, 1, 64, 64)", "(100, 1, 64, 64)", "(100, 32, 64, 64)", "(50, 64, 512, 512)")


class Competitor(Protocol):
    """Attributes: ``name``, and ``needs``, the packages that must be installed."""

    name: str
    needs: tuple[str, ...]

    def refuses(self, case: Case) -> str | None:
        """Why this competitor is not measured on the case, or None if it is."""

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        """A function that runs the case once."""

    def results(self, raw: Any) -> list[Tensor]:
        """The results of a run: the output, then in training the gradients, in leaf order."""


# Idle threads spin for some milliseconds after a call, on a core that the next call needs. A sample
# starts once they sleep, or after MAX_REST if they never do.
REST = 5e-3
MAX_REST = 0.5
# Calls are repeated until a sample is this long; the clock and interrupts would distort a shorter
# one. On busy cores a sample must span several time slices of the scheduler, of some ms each.
SAMPLE = 2e-3
BUSY_SAMPLE = 50e-3
MIN_ROUNDS = 7


class Rotated:
    """The same case on several copies of its tensors in turn, together larger than the L2 cache."""

    on_gpu = True

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = cycle(runs)

    def __call__(self) -> Any:
        return next(self.runs)()


def prepared(competitor: Competitor, case: Case, problems: Sequence[Problem], threads: int) -> Run:
    """A run of a case; on a GPU it rotates through the copies of the problem."""
    runs = [competitor.prepare(case, problem, threads) for problem in problems]
    return Rotated(runs) if problems[0].x.is_cuda else runs[0]


def rest(run: Run) -> None:
    """Wait until the threads of the previous run sleep, then wake those of this one."""
    if getattr(run, "on_gpu", False):
        torch.cuda.synchronize()
        run()
        return
    for _ in range(round(MAX_REST / REST)):
        before = time.process_time()
        time.sleep(REST)
        if time.process_time() - before < REST / 10:
            break
    run()


def timed(run: Run, repeats: int) -> float:
    """Seconds of one call; on a GPU measured by CUDA events."""
    if getattr(run, "on_gpu", False):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def repeats(run: Run, sample: float = SAMPLE) -> int:
    """The number of calls in a sample."""
    return max(1, round(sample / min(timed(run, 2) for _ in range(3))))


def missing(competitor: Competitor) -> str | None:
    absent = [n for n in competitor.needs if importlib.util.find_spec(n) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


class Module:
    """A library with the interface of torch.nn; for fastrnn optionally a named backend."""

    compiled = False
    padded = False  # a padded batch with ``lengths``, where the others get a packed batch

    def __init__(self, name: str, backend: str | None = None) -> None:
        self.name = f"{name} {backend}" if backend else name
        self.library, self.backend = name, backend
        self.needs = (backend,) if backend else ()

    def refuses(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        module = problem.module
        if self.library != "torch.nn":
            ours = make(importlib.import_module(self.library), case).to(problem.x)
            ours.load_state_dict(module.state_dict())
            module = ours.train(case.training)
        if self.compiled:
            torch._dynamo.reset()  # otherwise it refuses to compile more than eight layers
            module = torch.compile(module, fullgraph=True)
        x, hx = problem.x, problem.hx
        packed = case.packed and not self.padded
        more = {"lengths": problem.lengths} if self.padded else {}

        def output() -> Tensor:
            input = problem.pack(x) if packed else x  # packing is part of the measurement
            if self.backend:
                with fastrnn.use_backend(self.backend):
                    result = module(input, hx, **more)
            else:
                result = module(input, hx, **more)
            if case.one_step:
                return result[0] if case.cell == "LSTM" else result
            return result[0].data if packed else result[0]

        if not case.training:

            def infer() -> Any:
                with torch.inference_mode():
                    return [output()]

            return infer
        leaves = [x, *problem.state, *module.parameters()]
        cotangent = problem.cotangent
        if packed:
            cotangent = problem.pack(cotangent).data

        def train() -> Any:
            for leaf in leaves:
                leaf.requires_grad_()
            y = output()
            return [y, *torch.autograd.grad(y, leaves, cotangent)]

        return train

    def results(self, raw: Any) -> list[Tensor]:
        return [t.detach() for t in raw]


class Compiled(Module):
    """The fastrnn layer alone under ``torch.compile``, with nothing to fuse it with."""

    compiled = True

    def __init__(self) -> None:
        super().__init__("fastrnn")
        self.name = "fastrnn compiled"

    def refuses(self, case: Case) -> str | None:
        if not case.training or str(case.shape) not in COMPILED_SHAPES:
            return "measured in training only, at a few sizes"
        return _refuses_variants(case)


class Lengths(Module):
    """The fastrnn layer on a padded batch with ``lengths``; the others get it packed."""

    padded = True

    def __init__(self) -> None:
        super().__init__("fastrnn")
        self.name = "fastrnn lengths"

    def refuses(self, case: Case) -> str | None:
        return None if case.packed else "measured on the packed cases only, with their padded batch"

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        self.pack = problem.pack  # the results of torch.nn are packed
        return super().prepare(case, problem, threads)

    def results(self, raw: Any) -> list[Tensor]:
        output, *gradients = super().results(raw)
        return [self.pack(output).data, *gradients]


class FlashRnn:
    """https://github.com/NX-AI/flashrnn; one head is one layer."""

    name = "flashrnn"
    needs = ("flashrnn",)

    def refuses(self, case: Case) -> str | None:
        if case.cell != "LSTM":
            return "measured on the LSTM only, whose gates are those of torch"
        return _refuses_variants(case)

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        from flashrnn import flashrnn

        T, B, _, H = case.shape
        w_ih, w_hh, b_ih, b_hh = problem.module.parameters()
        leaves = [problem.x, *problem.state, w_ih, w_hh, b_ih, b_hh]
        dtype = str(problem.x.dtype).removeprefix("torch.")

        def forward() -> Tensor:
            gx = (problem.x @ w_ih.t()).transpose(0, 1).reshape(B, T, 4, 1, H)
            recurrent, bias = w_hh.view(4, 1, H, H), (b_ih + b_hh).view(4, 1, H)
            states = torch.stack(problem.state).view(2, B, 1, 1, H)
            y, _ = flashrnn(gx, recurrent, bias, states, function="lstm", dtype=dtype)
            return y[0, :, :, 0].transpose(0, 1)

        def infer() -> Any:
            with torch.inference_mode():
                return [forward()]

        def train() -> Any:
            for leaf in leaves:
                leaf.requires_grad_()
            y = forward()
            return [y, *torch.autograd.grad(y, leaves, problem.cotangent)]

        return train if case.training else infer

    def results(self, raw: Any) -> list[Tensor]:
        return [t.detach() for t in raw]


class CompiledLoop:
    """A Python loop over a cell, unrolled and fused by ``torch.compile``."""

    name = "torch.compile"
    needs = ()

    def refuses(self, case: Case) -> str | None:
        if str(case) != "LSTM-inference-37x5x48x96":
            return "measured on one case only: it compiles every step"
        return None

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        w_ih, w_hh, b_ih, b_hh = problem.module.parameters()

        def loop(x: Tensor, h: Tensor, c: Tensor) -> Tensor:
            outputs = []
            for gates in (x @ w_ih.t() + b_ih).unbind(0):
                i, f, g, o = (gates + h @ w_hh.t() + b_hh).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            return torch.stack(outputs)

        compiled = torch.compile(loop, fullgraph=True)
        h, c = (s[0] for s in problem.state)

        def infer() -> Any:
            with torch.no_grad():
                return [compiled(problem.x, h, c)]

        return infer

    def results(self, raw: Any) -> list[Tensor]:
        return list(raw)


class OnnxRuntime:
    name = "onnxruntime"
    needs = ("onnx", "onnxruntime")

    def refuses(self, case: Case) -> str | None:
        return "runs inference only" if case.training else _refuses_variants(case)

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            _onnx(case, problem).SerializeToString(), options, ["CPUExecutionProvider"]
        )
        feed = {"X": problem.x.numpy()}
        feed |= {f"state{k}": s.numpy() for k, s in enumerate(problem.state)}
        return lambda: session.run(["Y"], feed)

    def results(self, raw: Any) -> list[Tensor]:
        return [torch.from_numpy(raw[0])[:, 0]]


class OpenVino:
    name = "openvino"
    needs = ("onnx", "openvino")

    def refuses(self, case: Case) -> str | None:
        return "runs inference only" if case.training else _refuses_variants(case)

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        import openvino

        core = openvino.Core()
        model = core.read_model(_onnx(case, problem).SerializeToString())
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        request = compiled.create_infer_request()
        feed = [problem.x.numpy(), *(s.numpy() for s in problem.state)]
        for k, array in enumerate(feed):
            request.set_input_tensor(k, openvino.Tensor(array, shared_memory=True))

        def infer() -> Any:
            request.infer()
            return request.get_output_tensor(0).data

        return infer

    def results(self, raw: Any) -> list[Tensor]:
        return [torch.from_numpy(raw.copy())[:, 0]]


def _refuses_variants(case: Case) -> str | None:
    if case.variant not in ("", "1 thread"):
        return "not measured on variants"
    return None


def _onnx(case: Case, problem: Problem) -> Any:
    """The layer as one ONNX operator of fixed size."""
    from onnx import TensorProto, helper, numpy_helper

    T, B, I, H = case.shape
    order = ONNX_GATES[case.cell]

    def rows(w: Tensor) -> Any:
        return w.detach().view(len(order), H, -1)[list(order)].reshape(len(order) * H, -1).numpy()

    w_ih, w_hh, b_ih, b_hh = (rows(p) for p in problem.module.parameters())
    tensors = {
        "W": w_ih[None],
        "R": w_hh[None],
        "B": np.concatenate([b_ih[:, 0], b_hh[:, 0]])[None],
    }
    names = [f"state{k}" for k in range(len(problem.state))]
    attributes: dict[str, Any] = {"hidden_size": H}
    if case.cell == "GRU":
        attributes["linear_before_reset"] = 1
    node = helper.make_node(case.cell, ["X", "W", "R", "B", "", *names], ["Y"], **attributes)
    float32 = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("X", float32, [T, B, I])]
    inputs += [helper.make_tensor_value_info(n, float32, [1, B, H]) for n in names]
    graph = helper.make_graph(
        [node],
        "layer",
        inputs,
        [helper.make_tensor_value_info("Y", float32, [T, 1, B, H])],
        [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in tensors.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8, producer_name="bench"
    )


class Jax:
    """``lax.scan`` under ``jit``, with the product W_ih x ahead of the loop."""

    name = "jax"
    needs = ("jax",)

    def refuses(self, case: Case) -> str | None:
        if case.packed:
            return "has no packed batches"
        if case.one_step or case.deterministic:
            return "not measured on variants"
        if case.threads is not None:
            return "cannot change its number of threads within a process"
        return None

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        # XLA reads these once, at its first computation.
        os.environ.setdefault(
            "XLA_FLAGS", f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
        )
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("NPROC", str(threads))
        import jax
        import jax.numpy as jnp

        def step(carry: Any, gx: Any, w: Any, b: Any) -> Any:
            h = carry[0]
            gh = h @ w.T + b
            if case.cell == "RNN":
                h = jnp.tanh(gx + gh)
                return (h,), h
            if case.cell == "GRU":
                r_x, z_x, n_x = jnp.split(gx, 3, -1)
                r_h, z_h, n_h = jnp.split(gh, 3, -1)
                z = jax.nn.sigmoid(z_x + z_h)
                n = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
                h = n + z * (h - n)
                return (h,), h
            i, f, g, o = jnp.split(gx + gh, 4, -1)
            c = jax.nn.sigmoid(f) * carry[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        D = 2 if case.bidirectional else 1

        def forward(x: Any, state: Any, parameters: Any) -> Any:
            for layer in range(case.layers):
                outputs = []
                for d in range(D):
                    k = layer * D + d
                    w_ih, w_hh, b_ih, b_hh = parameters[4 * k : 4 * k + 4]
                    _, y = jax.lax.scan(
                        lambda carry, gx, w=w_hh, b=b_hh: step(carry, gx, w, b),
                        tuple(s[k] for s in state),
                        x @ w_ih.T + b_ih,
                        reverse=d == 1,
                    )
                    outputs.append(y)
                x = jnp.concatenate(outputs, -1) if D > 1 else outputs[0]
            return x

        def train(arguments: Any, cotangent: Any) -> Any:
            output, backward = jax.vjp(lambda a: forward(*a), arguments)
            x, state, parameters = backward(cotangent)[0]
            return [output, x, *state, *parameters]

        def array(t: Tensor) -> Any:
            return jnp.asarray(t.detach().numpy())

        arguments = (
            array(problem.x),
            tuple(map(array, problem.state)),
            tuple(map(array, problem.module.parameters())),
        )
        if case.training:
            compiled, cotangent = jax.jit(train), array(problem.cotangent)
            return lambda: jax.block_until_ready(compiled(arguments, cotangent))
        infer = jax.jit(forward)
        return lambda: jax.block_until_ready([infer(*arguments)])

    def results(self, raw: Any) -> list[Tensor]:
        return [torch.from_numpy(np.array(a)) for a in raw]


class _Nothing(torch.autograd.Function):
    """Takes as many arguments as a layer and returns a gradient for each."""

    @staticmethod
    def forward(ctx: Any, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return leaves[1].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


class Floor:
    """The cost of a call that computes little or nothing: a limit, not a competitor."""

    def __init__(self, name: str, compiled: bool = False) -> None:
        self.name = f"{name} compiled" if compiled else name
        self.compiled = compiled

    def refuses(self, case: Case) -> str | None:
        # The cost of a compiled graph is compared with that of nn.Linear.
        if COMPILED.refuses(case) is None and self.name != "nothing":
            return None
        single_step = case.shape.T == case.shape.B == 1 and not self.compiled
        return None if single_step else "measured on single steps, and beside compiled layers"

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        x, h = problem.x, problem.state[0]
        nothing = self.name == "nothing"
        if nothing:
            module: Any = nn.Identity()
            leaves = [x, h, *problem.module.parameters()]
        else:
            module = nn.Linear(case.shape.I, case.shape.H).to(x)
            leaves = [x, *module.parameters()]
            if self.compiled:
                module = torch.compile(module, fullgraph=True)

        def infer() -> Any:
            with torch.inference_mode():
                return module(x)

        def train() -> Any:
            for leaf in leaves:
                leaf.requires_grad_()
            y = _Nothing.apply(*leaves) if nothing else module(x)
            return torch.autograd.grad(y, leaves, problem.cotangent)

        return train if case.training else infer


class Model(nn.Module):
    """A layer and what usually surrounds it, so that a compiler has something to fuse."""

    def __init__(self, layer: nn.Module, inputs: int, units: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.layer = layer
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(units, 64)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        y = self.layer(self.norm(x))
        y = y if isinstance(y, Tensor) else y[0]
        return nn.functional.cross_entropy(self.head(self.dropout(y)).flatten(0, 1), classes)


class InModel:
    """A training step of a model with the fastrnn layer, or ``nn.Linear`` in its place."""

    def __init__(self, layer: str, compiled: bool = False) -> None:
        self.linear = layer == "nn.Linear"
        self.name = f"model with {layer}" + " compiled" * compiled
        self.compiled = compiled

    def refuses(self, case: Case) -> str | None:
        return COMPILED.refuses(case)

    def prepare(self, case: Case, problem: Problem, threads: int) -> Run:
        T, B, I, H = case.shape
        layer = nn.Linear(I, H) if self.linear else make(fastrnn, case)
        model: Any = Model(layer, I, H).to(problem.x)
        leaves = list(model.parameters())
        classes = torch.randint(64, (T * B,), device=problem.x.device)
        if self.compiled:
            model = torch.compile(model, fullgraph=True)
        return lambda: torch.autograd.grad(model(problem.x, classes), leaves)


OURS = Module("fastrnn")
TORCH = Module("torch.nn")
COMPILED = Compiled()
FASTRNN_VARIANTS = (Module("fastrnn", "numba"), COMPILED, Lengths())
COMPETITORS: tuple[Competitor, ...] = (
    TORCH,
    OnnxRuntime(),
    OpenVino(),
    Jax(),
    CompiledLoop(),
    *FASTRNN_VARIANTS,
)
GPU_COMPETITORS: tuple[Competitor, ...] = (TORCH, FlashRnn())
FLOORS = (
    Floor("nothing"),
    *(
        competitor(name, compiled)
        for competitor, name in (
            (Floor, "nn.Linear"),
            (InModel, "fastrnn"),
            (InModel, "nn.Linear"),
        )
        for compiled in (False, True)
    ),
)


# Tolerances relative to the norm, and to the largest element. In 16 bits both sides round; on a GPU
# cuDNN also rounds float32, to TF32.
TF32 = (2e-3, 1e-2)
CLOSE = {torch.float32: (1e-4, 1e-3), torch.float16: (2e-2, 5e-2), torch.bfloat16: (5e-2, 2e-1)}


def check(competitor: Competitor, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise AssertionError if the results differ from those of torch.nn.

    Checks the norm of the error and its largest element, each relative to the torch.nn result.
    """
    norm, largest = CLOSE[expected[0].dtype]
    if expected[0].is_cuda and expected[0].dtype is torch.float32:
        norm, largest = TF32
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, f"{competitor.name}: result {k} is {a.shape}, not {b.shape}"
        a, b = a.float(), b.float()
        error = float((a - b).norm() / b.norm().clamp_min(1e-30))
        assert error < norm, f"{competitor.name}: result {k} differs from torch.nn's by {error:.1e}"
        worst = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        assert worst < largest, (
            f"{competitor.name}: an element of {k} differs from torch.nn's by {worst:.1e}"
        )
