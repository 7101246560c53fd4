"""GPU time of a layer of fastrnn and of torch.nn, each replayed from a CUDA graph.

    python bench/graphs.py [--out FILE]     measure on the GPU of this machine and print the tables
    python bench/graphs.py FILE             print the tables of a stored measurement

A replayed graph excludes host time, which dominates short layers; ``pytest bench --device cuda``
includes it. The Triton kernels run at every size, even where the automatic choice is torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastrnn

T = 64
DTYPES = ("bfloat16", "float32", "float16")
CELLS = ("RNN", "GRU", "LSTM")
HIDDEN = (64, 128, 256, 512, 1024, 2048)
BATCHES = (16, 64, 256)
PASSES = ("training", "inference")

Run = Callable[[], Any]


def layer(library: Any, cell: str, dtype: torch.dtype, H: int, B: int) -> dict[str, Run]:
    """One training step and one inference pass of a layer with I = H."""
    module = getattr(library, cell)(H, H).to("cuda", dtype)
    x, dy = (torch.randn(T, B, H, device="cuda", dtype=dtype) for _ in range(2))
    leaves = [x.requires_grad_(), *module.parameters()]

    def train() -> Any:
        return torch.autograd.grad(module(x)[0], leaves, dy)

    def infer() -> Any:
        with torch.inference_mode():
            return module(x)[0]

    return dict(zip(PASSES, (train, infer), strict=True))


def replayed(run: Run) -> float:
    """Microseconds per call in a graph: the median of three samples of five replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def timed(times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / times

    timed(4)
    microseconds = statistics.median(timed(5) for _ in range(3))
    del results
    return round(microseconds, 1)


def measure() -> dict[str, Any]:
    from rich.progress import track

    measured = []
    every = list(itertools.product(DTYPES, CELLS, HIDDEN, BATCHES))
    with fastrnn.use_backend("triton"):
        for dtype, cell, H, B in track(every, "measuring"):
            row: dict[str, Any] = {"dtype": dtype, "cell": cell, "H": H, "B": B}
            for name, library in (("torch", nn), ("fastrnn", fastrnn)):
                runs = layer(library, cell, getattr(torch, dtype), H, B)
                row[name] = {which: replayed(run) for which, run in runs.items()}
            measured.append(row)
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    versions += f", cuDNN {torch.backends.cudnn.version()}"
    return {"device": torch.cuda.get_device_name(), "versions": versions, "rows": measured}


def tables(measured: dict[str, Any]) -> str:
    """Time of torch.nn over time of fastrnn, and in parentheses the latter in µs."""
    rows = {(r["dtype"], r["cell"], r["H"], r["B"]): r for r in measured["rows"]}
    lines = [f"{measured['device']}, {measured['versions']}; T = {T}, I = H"]
    columns = [(which, B) for which in reversed(PASSES) for B in BATCHES]
    for dtype in DTYPES:
        lines += ["", f"| {dtype} | H | " + " | ".join(f"{w}, B {B}" for w, B in columns) + " |"]
        lines.append("|---|---:|" + "---:|" * len(columns))
        for cell, H in itertools.product(CELLS, HIDDEN):
            cells = [_cell(rows.get((dtype, cell, H, B)), which) for which, B in columns]
            lines.append(f"| {cell} | {H} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, which: str) -> str:
    if row is None:
        return ""
    ours = row["fastrnn"][which]
    ratio = row["torch"][which] / ours
    shown = f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
    return f"{shown} ({ours:.0f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="stored measurement to print")
    parser.add_argument("--out", type=Path, help="where to write the measurement")
    args = parser.parse_args(arguments)
    if args.file:
        measured = json.loads(args.file.read_text())
    elif not torch.cuda.is_available():
        parser.error(f"expected a GPU or a file to print, torch {torch.__version__} finds no GPU")
    else:
        measured = measure()
        if args.out:
            args.out.write_text(json.dumps(measured) + "\n")
    print(tables(measured))


if __name__ == "__main__":
    main()
