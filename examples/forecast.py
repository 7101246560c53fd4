#!/usr/bin/env python
"""Forecast a time series, the sunspots of each year since 1700, one to eleven years ahead.

    LSTM (or GRU, or RNN) -> linear -> number of the next year

The series is split in time order. The network learns from the first years, the following years
select the best training step, and the last years, used for nothing else, are the test. Two
baselines are the naive forecast (next year equals this year) and the value eleven years before, one
sunspot cycle. For more than one year ahead the network reads its own forecasts.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training import (
    BLUE,
    CELL,
    GREY,
    RED,
    Option,
    Training,
    fail,
    figure,
    learning,
    run_program,
    start,
)

import fastrnn

SERIES = Path(__file__).parent / "data" / "sunspots.csv"
OPTIONS = [
    CELL,
    Option("hidden", 32, "hidden_size of the layer"),
    Option("window", 48, "years per training sequence"),
    Option("batch_size", 32, "sequences per training step, from random training years"),
    *learning(600),
]
TRAIN, VALIDATION = 0.7, 0.85
"""The shares of the series at which the training and the validation years end."""

CYCLE = 11


class Forecaster(nn.Module):
    def __init__(self, rnn: type[nn.Module], hidden: int) -> None:
        super().__init__()
        self.rnn = rnn(1, hidden)
        self.linear = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """x: [T, B, 1]. Returns the predicted change after each value, and the state."""
        output, state = self.rnn(x, state)
        return self.linear(output), state


class Series:
    """Numbers in time order, scaled for the network by mean and deviation of the training years."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))[1:]
            self.times = [int(row[0]) for row in rows]
            self.values = torch.tensor([float(row[1]) for row in rows])
        except (OSError, ValueError, IndexError) as error:
            fail(f"{path}: expected a line of names, then lines of a year and a value: {error}")
        self.train, self.validation = (round(part * len(rows)) for part in (TRAIN, VALIDATION))
        self.mean, self.scale = self.values[: self.train].mean(), self.values[: self.train].std()

    def network(self) -> Tensor:
        return ((self.values - self.mean) / self.scale)[:, None, None]


@torch.no_grad()
def forecasts(model: Forecaster, series: Series, ahead: int) -> Tensor:
    """The next ``ahead`` values from each time but the last: ``[T - 1, ahead]``."""
    x = series.network()[:-1]
    # The state after each prefix of the series is all that a forecast from there may use.
    states, state, steps = [], None, []
    for t in range(len(x)):
        change, state = model(x[t : t + 1], state)
        states.append(state)
        steps.append(x[t] + change[0])
    value = torch.stack(steps, 1)
    parts = zip(*((s,) if isinstance(s, Tensor) else s for s in states), strict=True)
    joined = tuple(torch.cat(part, 1) for part in parts)
    state = joined if len(joined) > 1 else joined[0]
    values = [value]
    for _ in range(ahead - 1):
        change, state = model(values[-1], state)
        values.append(values[-1] + change)
    return torch.cat(values)[:, :, 0].t() * series.scale + series.mean


def errors(predicted: Tensor, series: Series, first: int, last: int) -> list[float]:
    """Root mean square errors by years ahead, for forecasts of the times [first, last)."""
    by_years = []
    for ahead in range(1, predicted.shape[1] + 1):
        origins = torch.arange(first - ahead, last - ahead)
        wrong = predicted[origins, ahead - 1] - series.values[origins + ahead]
        by_years.append(wrong.square().mean().sqrt().item())
    return by_years


def naive(series: Series, ahead: int, cycle: int = 1) -> Tensor:
    """Like ``forecasts``: the last known value of the same phase of the cycle."""
    origins = torch.arange(len(series.values) - 1)
    back = [cycle * -(-k // cycle) - k for k in range(1, ahead + 1)]
    return torch.stack([series.values[(origins - b).clamp_min(0)] for b in back], 1)


def plot(
    path: Path,
    title: str,
    training: Training,
    series: Series,
    predicted: Tensor,
    curves: dict[str, list[float]],
) -> None:
    how = {"figsize": (15, 4.2), "width_ratios": (1, 1.8, 1)}
    with figure(path, title, 1, 3, **how) as (first, left, right):
        training.draw(first, "mean square error, of the scaled numbers")
        begin = series.train - 20
        left.plot(series.times[begin:], series.values[begin:], color=BLUE, label="sunspots")
        left.plot(
            series.times[series.train :],
            predicted[series.train - 1 :, 0],
            color=RED,
            ls="--",
            label="forecast a year before",
        )
        for at, what in ((series.train, "validation"), (series.validation, "test")):
            left.axvline(series.times[at], color="0.6", lw=1)
            left.text(series.times[at] + 0.5, left.get_ylim()[1] * 0.95, what, color="0.4")
        left.set(xlabel="year", ylabel="sunspots")
        for (name, values), color in zip(curves.items(), (RED, BLUE, GREY), strict=True):
            right.plot(range(1, len(values) + 1), values, label=name, color=color, marker=".")
        right.set(xlabel="years ahead", ylabel="root mean square error, test years", ylim=(0, None))
        for panel in (left, right):
            panel.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        what = f"CSV file: a line of names, then years and values (default {SERIES.name})"
        parser.add_argument("series", nargs="?", type=Path, default=SERIES, help=what)

    args, config, resumed = start("forecast", __doc__, OPTIONS, argv, arguments)
    series = Series(args.series)
    window, T = config["window"], series.train
    if max(window, CYCLE) >= T:
        why = f"a --window of {window}" if window >= CYCLE else f"a cycle of {CYCLE}"
        fail(f"{args.series} has {T} values to learn from, not more than {why}")

    rnn = getattr(fastrnn, config["cell"].upper())
    data = series.times, series.values.tolist()
    training = Training(
        "forecast", model := Forecaster(rnn, config["hidden"]), config, data, resumed
    )
    numbers = series.network()[:T, 0, 0]
    sequences = numbers.unfold(0, window + 1, 1).t()[:, :, None]  # [window + 1, count, 1]

    def loss_of_a_batch() -> Tensor:
        batch = sequences[:, torch.randint(sequences.shape[1], (config["batch_size"],))]
        change, _ = model(batch[:-1])
        loss: Tensor = nn.functional.mse_loss(batch[:-1] + change, batch[1:])
        return loss

    def validate() -> float:
        error = errors(forecasts(model, series, 1), series, T, series.validation)[0]
        return (error / series.scale.item()) ** 2

    last = len(series.values)
    starts, ends, tested = (series.times[k] for k in (0, T - 1, series.validation))
    years = f"training on {starts} to {ends}, test from {tested}"
    print(f"{args.series.name}: {last} values; {years}", flush=True)
    training.run(loss_of_a_batch, validate, 20, args.checkpoint)

    predicted = forecasts(model, series, CYCLE)
    test = (series, series.validation, last)
    curves = {
        f"{rnn.__name__}({config['hidden']})": errors(predicted, *test),
        "as this year": errors(naive(series, CYCLE), *test),
        f"as {CYCLE} years before": errors(naive(series, CYCLE, CYCLE), *test),
    }
    print(f"\nroot mean square error in the test years, one to {CYCLE} years ahead")
    for name, values in curves.items():
        print(f"  {name:20}" + " ".join(f"{value:5.1f}" for value in values))
    ours, this_year, _ = curves.values()
    title = f"One year ahead the error is {ours[0]:.1f}, of the naive forecast {this_year[0]:.1f}"
    print(f"\n{title}.")
    if args.plot:
        plot(args.plot, title, training, series, predicted, curves)


if __name__ == "__main__":
    run_program(main)
