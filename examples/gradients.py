#!/usr/bin/env python
"""Why the gates matter: how much of a gradient reaches the early steps of a long sequence.

A layer reads characters of a book, and `fastrnn.diagnostics.gradient_flow` says how large the
gradient of its last state is with respect to its state after each step. Four pictures: an RNN's
gradient vanishes or explodes; what the gates of a GRU and an LSTM change; what initialisation does;
and what clipping does to a training in which it explodes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from char_lm import BOOK, CharLM, streams
from sequences import by_frequency
from torch import Tensor, nn
from training import check_files, clip, figure, progress, run_program

import fastrnn
from fastrnn.diagnostics import gradient_flow

HIDDEN, EMBEDDING, BATCH = 64, 32, 16
COLORS = ["#1d3557", "#e76f51", "#2a9d8f", "#8d99ae"]
CLIPPING = {
    "not clipped": {"clip_norm": 0.0, "clip_value": 0.0},
    "norm clipped at 1": {"clip_norm": 1.0, "clip_value": 0.0},
    "values clipped at 0.1": {"clip_norm": 0.0, "clip_value": 0.1},
}

Curves = dict[str, Tensor]


def characters() -> tuple[Tensor, int]:
    """The book as numbers, in BATCH contiguous streams, [N, BATCH], and how many there are."""
    text = BOOK.read_text(encoding="utf-8")
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    return streams(torch.tensor([index[character] for character in text]), BATCH), len(index)


def reaches(layer: fastrnn.RNNBase, x: Tensor, state: str = "h") -> Tensor:
    """Of the gradient of the last h or c the part that reaches that of each step."""
    last = 0 if state == "h" else 1
    flow = gradient_flow(layer.double(), x, loss=lambda _, final: final[last].sum())
    norm = flow.gradient[state][0, 0]
    return norm / norm[-1]


def relu(scale: float) -> fastrnn.RNN:
    return fastrnn.init.identity_(fastrnn.RNN(EMBEDDING, HIDDEN, nonlinearity="relu"), scale)


def flows(x: Tensor) -> dict[str, Curves]:
    """What reaches each step, by picture and layer."""

    def lstm(change: Callable[[fastrnn.LSTM], Any] = lambda _: None) -> fastrnn.LSTM:
        torch.manual_seed(0)  # all begin with the same weights
        change(layer := fastrnn.LSTM(EMBEDDING, HIDDEN))
        return layer

    init = fastrnn.init
    return {
        "a relu RNN whose W_hh is a multiple of the identity": {
            f"W_hh = {scale} I": reaches(relu(scale), x) for scale in (0.9, 1.0, 1.1)
        },
        "layers as torch.nn initialises them": {
            "RNN": reaches(fastrnn.RNN(EMBEDDING, HIDDEN), x),
            "GRU": reaches(fastrnn.GRU(EMBEDDING, HIDDEN), x),
            "LSTM, h": reaches(lstm(), x),
            "LSTM, c": reaches(lstm(), x, "c"),
        },
        "the c of an LSTM, initialised": {
            "as torch.nn does": reaches(lstm(), x, "c"),
            "with forget_bias_(layer, 1)": reaches(lstm(init.forget_bias_), x, "c"),
            "with forget_bias_(layer, 4)": reaches(lstm(lambda m: init.forget_bias_(m, 4)), x, "c"),
            "with chrono_": reaches(lstm(lambda m: init.chrono_(m, len(x))), x, "c"),
        },
    }


def clipped(data: Tensor, symbols: int, length: int, steps: int) -> dict[str, Curves]:
    """The losses and the norms of a training of an RNN whose gradient explodes, by clipping."""
    found: dict[str, Curves] = {"loss": {}, "norm": {}}
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
        found["loss"][name], found["norm"][name] = torch.tensor(losses), torch.tensor(norms)
    return found


def finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]


def plot(path: Path, pictures: dict[str, Curves], losses: Curves, length: int) -> None:
    title = (
        f"What of the last step's gradient reaches each of {length} steps, and what clipping does"
    )
    with figure(path, title, 2, 2, figsize=(12, 8)) as panels:
        *reached, last = panels.flatten()
        for panel, (name, curves) in zip(reached, pictures.items(), strict=True):
            for (label, values), color in zip(curves.items(), COLORS, strict=False):
                panel.plot(range(1, len(values) + 1), values, color=color, label=label)
            low = min(values.min().item() for values in curves.values())
            panel.set(title=name, xlabel="time step", yscale="log", ylim=(max(low, 1e-20), None))
            panel.set_ylabel("gradient, over the last step's")
        for (label, values), color in zip(losses.items(), COLORS, strict=False):
            shown, mark = finite(values), None
            if len(shown) < len(values):
                mark, label = "x", f"{label}, no number after step {len(shown)}"
            last.plot(range(1, len(shown) + 1), shown, color=color, label=label, marker=mark)
        last.set(title="a relu RNN from W_hh = I, trained by SGD", xlabel="training step")
        last.set(ylabel="loss, nats per character", yscale="log")
        for panel in panels.flatten():
            panel.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("gradients", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=200, help="time steps (default 200)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default 600)")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the result here")
    args = parser.parse_args(argv)
    check_files(parser, args.plot)
    data, symbols = characters()
    if not 2 <= args.length < len(data) // 2 or args.steps < 1:
        parser.error(f"expected --length from 2 to {len(data) // 2 - 1} and --steps 1 or more")
    torch.manual_seed(0)
    x = nn.functional.embedding(data[: args.length], torch.randn(symbols, EMBEDDING).double())
    pictures = flows(x)
    losses = clipped(data, symbols, args.length, args.steps)
    print(f"\nof the last step's gradient reaches the first of {args.length} steps:")
    for name, curves in pictures.items():
        print(f"  {name}")
        for label, values in curves.items():
            print(f"    {label:28}{values[0].item():9.1e}")
    learnt = data[: args.steps * args.length].flatten()
    constant = by_frequency(learnt, learnt, symbols)
    print(f"\na relu RNN from W_hh = I, {args.steps} steps of SGD on {args.length} characters:")
    print(f"  {'':22}{'largest gradient':>18}{'last loss, nats':>18}")
    for label, values in losses["loss"].items():
        largest = finite(losses["norm"][label]).max().item()
        print(f"  {label:22}{largest:18.1e}{values[-1].item():18.2f}")
    print(f"  by the characters' frequency{constant:30.2f}")
    if args.plot:
        plot(args.plot, pictures, losses["loss"], args.length)


if __name__ == "__main__":
    run_program(main)
