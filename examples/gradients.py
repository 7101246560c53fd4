#!/usr/bin/env python
"""Why the gates matter: how much of a gradient reaches the early steps of a long sequence.

A layer reads the characters of a book. `fastrnn.diagnostics.gradient_flow` measures the gradient of
its last state with respect to its state after each step. The panels show how the gradient of an RNN
vanishes or explodes, what the gates of a GRU and an LSTM change, the effect of initialisation, and
the effect of clipping on a training in which the gradient explodes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from char_lm import BOOK, CharLM, streams
from sequences import by_frequency, numbered, read_text
from torch import Tensor, nn
from training import BLUE, GREEN, GREY, RED, check_files, clip, figure, progress, run_program

import fastrnn
from fastrnn.diagnostics import GradientFlow, gradient_flow

HIDDEN, EMBEDDING, BATCH = 64, 32, 16
COLORS = [BLUE, RED, GREEN, GREY]
CLIPPING = {
    "not clipped": {"clip_norm": 0.0, "clip_value": 0.0},
    "norm clipped at 1": {"clip_norm": 1.0, "clip_value": 0.0},
    "values clipped at 0.1": {"clip_norm": 0.0, "clip_value": 0.1},
}

Curves = dict[str, Tensor]


def characters() -> tuple[Tensor, int]:
    """The book as BATCH contiguous streams of indices, [N, BATCH], and the number of symbols."""
    symbols, ids = numbered(read_text(BOOK))
    return streams(ids, BATCH), len(symbols)


def measured(layer: fastrnn.RNNBase, x: Tensor, state: str = "h") -> GradientFlow:
    """The gradient of the last h or c, with respect to the state after each step."""
    last = 0 if state == "h" else 1
    return gradient_flow(layer.double(), x, loss=lambda _, final: final[last].sum())


def reaches(flow: GradientFlow, state: str = "h") -> Tensor:
    """The norm of that gradient at each step, over its norm at the last step."""
    norm = flow.gradient[state][0, 0]
    return norm / norm[-1]


def relu(scale: float) -> fastrnn.RNN:
    return fastrnn.init.identity_(fastrnn.RNN(EMBEDDING, HIDDEN, nonlinearity="relu"), scale)


def lstm(change: Callable[[fastrnn.LSTM], Any] = lambda _: None) -> fastrnn.LSTM:
    torch.manual_seed(0)  # the same initial weights for all
    change(layer := fastrnn.LSTM(EMBEDDING, HIDDEN))
    return layer


def pictures(x: Tensor) -> dict[str, Curves]:
    """The curves by panel and layer: gradients by step, then the forget gates."""
    init = fastrnn.init
    lstms = {
        "as torch.nn does": measured(lstm(), x, "c"),
        "with forget_bias_(layer, 1)": measured(lstm(init.forget_bias_), x, "c"),
        "with forget_bias_(layer, 4)": measured(lstm(lambda m: init.forget_bias_(m, 4)), x, "c"),
        "with chrono_": measured(lstm(lambda m: init.chrono_(m, len(x))), x, "c"),
    }
    return {
        "a relu RNN whose W_hh is a multiple of the identity": {
            f"W_hh = {scale} I": reaches(measured(relu(scale), x)) for scale in (0.9, 1.0, 1.1)
        },
        "layers as torch.nn initialises them": {
            "RNN": reaches(measured(fastrnn.RNN(EMBEDDING, HIDDEN), x)),
            "GRU": reaches(measured(fastrnn.GRU(EMBEDDING, HIDDEN), x)),
            "LSTM, h": reaches(measured(lstm(), x)),
            "LSTM, c": reaches(lstms["as torch.nn does"], "c"),
        },
        "the c of an LSTM, initialised": {n: reaches(flow, "c") for n, flow in lstms.items()},
        "the forget gates of these LSTMs": {n: f.saturation["f"][0, 0] for n, f in lstms.items()},
    }


def clipped(data: Tensor, symbols: int, length: int, steps: int) -> dict[str, Curves]:
    """Losses and gradient norms of an RNN whose gradient explodes, for each kind of clipping."""
    curves: dict[str, Curves] = {"loss": {}, "norm": {}}
    for name, limits in CLIPPING.items():
        torch.manual_seed(0)
        config = {"embedding": EMBEDDING, "hidden": HIDDEN, "layers": 1, "dropout": 0.0}
        rnn = functools.partial(fastrnn.RNN, nonlinearity="relu")
        model = CharLM(rnn, symbols, config)
        fastrnn.init.identity_(model.rnn)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        losses: list[float] = []
        norms: list[float] = []

        def last(losses: list[float] = losses) -> str:
            return f"loss {losses[-1]:.3f}"

        with progress(name, 0, steps, last) as report:
            for step in range(1, steps + 1):
                at = (step - 1) * length % (len(data) - length - 1)
                x, y = data[at : at + length], data[at + 1 : at + length + 1]
                optimizer.zero_grad()
                logits, _ = model(x)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
                loss.backward()
                norms.append(clip(model, limits))
                optimizer.step()
                losses.append(loss.item())
                report(step)
        curves["loss"][name], curves["norm"][name] = torch.tensor(losses), torch.tensor(norms)
    return curves


def finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]


def plot(path: Path, found: dict[str, Curves], trained: dict[str, Curves], constant: float) -> None:
    length = len(next(iter(next(iter(found.values())).values())))
    title = f"The gradient of the last step at each of {length} steps, and the effect of clipping"
    with figure(path, title, 2, 3, figsize=(16, 8)) as panels:
        *shown, losses, norms = panels.flatten()
        for panel, (name, curves) in zip(shown, found.items(), strict=True):
            for (label, values), color in zip(curves.items(), COLORS, strict=False):
                panel.plot(range(1, len(values) + 1), values, color=color, label=label)
            panel.set(title=name, xlabel="time step")
            if panel is shown[-1]:
                panel.set(ylabel="share of units below 0.1 or above 0.9", ylim=(-0.05, 1.1))
            else:
                low = min(values.min().item() for values in curves.values())
                panel.set(ylabel="gradient, relative to the last step", yscale="log")
                panel.set(ylim=(max(low, 1e-20), None))
        for panel, curves in (losses, trained["loss"]), (norms, trained["norm"]):
            for (label, values), color in zip(curves.items(), COLORS, strict=False):
                some, mark = finite(values), None
                if len(some) < len(values):
                    mark, label = "x", f"{label}, not finite after step {len(some)}"
                panel.plot(range(1, len(some) + 1), some, color=color, label=label, marker=mark)
            panel.set(xlabel="training step", title="a relu RNN from W_hh = I, trained by SGD")
        losses.axhline(constant, color=GREY, ls="--", label="by the characters' frequency")
        losses.set(ylabel="loss, nats per character", ylim=(2, 6))
        norms.set(ylabel="norm of the gradient before clipping", yscale="log")
        for panel in panels.flatten():
            panel.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("gradients", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=200, help="time steps (default 200)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default 600)")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the result here")
    what = "draw here GradientFlow.plot() of a bidirectional LSTM of two layers"
    parser.add_argument("--flow", type=Path, metavar="PATH", help=what)
    args = parser.parse_args(argv)
    for path in args.plot, args.flow:
        check_files(parser, path)
    data, symbols = characters()
    if not 2 <= args.length < len(data) // 2 or args.steps < 1:
        parser.error(f"expected --length from 2 to {len(data) // 2 - 1} and --steps 1 or more")
    torch.manual_seed(0)
    x = nn.functional.embedding(data[: args.length], torch.randn(symbols, EMBEDDING).double())
    found = pictures(x)
    *reached, (gates, shares) = found.items()
    print(f"\ngradient at the first of {args.length} steps, relative to the last step:")
    for name, curves in reached:
        print(f"  {name}")
        for label, values in curves.items():
            print(f"    {label:28}{values[0].item():9.1e}")
    print(f"\n{gates}, share of units below 0.1 or above 0.9, mean over the steps:")
    for label, values in shares.items():
        print(f"    {label:28}{values.mean().item():9.1%}")
    print(flush=True)
    trained = clipped(data, symbols, args.length, args.steps)
    read = data[: args.steps * args.length].flatten()
    constant = by_frequency(read, read, symbols)
    print(f"\na relu RNN from W_hh = I, {args.steps} steps of SGD on {args.length} characters:")
    print(f"  {'':22}{'largest gradient':>18}{'last losses, nats':>19}")
    for label, values in trained["loss"].items():
        largest = finite(trained["norm"][label]).max().item()
        print(f"  {label:22}{largest:18.1e}{values[-20:].mean().item():19.2f}")
    print(f"  by the characters' frequency{constant:31.2f}")
    if args.plot:
        plot(args.plot, found, trained, constant)
    if args.flow:
        layers = fastrnn.LSTM(EMBEDDING, HIDDEN, 2, bidirectional=True)
        flow = gradient_flow(fastrnn.init.forget_bias_(layers, 2).double(), x)
        flow.plot().savefig(args.flow, dpi=150)
        print(f"Drawn in {args.flow}.")


if __name__ == "__main__":
    run_program(main)
