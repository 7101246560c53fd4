#!/usr/bin/env python
"""One to one: a recurrent layer that runs one step is a plain network, shown on sunspots.

    eleven years -> one step of LSTM (or GRU, or RNN) -> linear -> the next year

The initial state is zero, so W_hh has no effect: an RNN is then a tanh layer, and an LSTM and a
GRU are gated layers. The program trains the recurrent layer, copies its weights into
torch.nn.Linear layers, and shows that both have the same outputs and gradients. It compares with
the naive forecast. `forecast.py` carries the state from year to year.
"""

from __future__ import annotations

import torch
from forecast import CYCLE, SERIES, Series
from torch import Tensor, nn
from training import (
    BLUE,
    CELL,
    GREY,
    RED,
    Option,
    Training,
    figure,
    learning,
    run_program,
    start,
)

import fastrnn

OPTIONS = [
    CELL,
    Option("hidden", 32, "hidden_size of the layer"),
    Option("batch_size", 32, "batch size of a training step"),
    *learning(600),
]


class OneStep(nn.Module):
    def __init__(self, rnn: type[nn.Module], inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn = rnn(inputs, hidden)
        self.linear = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, I]. Returns [B]."""
        output, _ = self.rnn(x[None])  # T = 1
        value: Tensor = self.linear(output[0])
        return value.squeeze(1)


class Plain(nn.Module):
    """The same network without recurrence: a linear layer, the gates, a linear layer."""

    def __init__(self, model: OneStep) -> None:
        super().__init__()
        rnn = model.rnn
        self.mode = rnn.mode
        self.gates = nn.Linear(rnn.input_size, len(rnn.weight_ih_l0))
        self.hidden_bias = nn.Parameter(rnn.bias_hh_l0.detach().clone())
        self.linear = nn.Linear(rnn.hidden_size, 1)
        with torch.no_grad():
            self.gates.weight.copy_(rnn.weight_ih_l0)
            self.gates.bias.copy_(rnn.bias_ih_l0)
        self.linear.load_state_dict(model.linear.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gates(x), self.hidden_bias
        if self.mode == "LSTM":
            i, _, g, o = (a + b).chunk(4, 1)  # the forget gate has nothing to forget
            h = o.sigmoid() * torch.tanh(i.sigmoid() * g.tanh())
        elif self.mode == "GRU":
            (r, z, n), (b_r, b_z, b_n) = a.chunk(3, 1), b.chunk(3)
            h = (1 - (z + b_z).sigmoid()) * torch.tanh(n + (r + b_r).sigmoid() * b_n)
        else:
            h = torch.tanh(a + b)
        value: Tensor = self.linear(h)
        return value.squeeze(1)


def differences(model: OneStep, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Compare both networks in float64.

    Returns:
        The largest difference of the outputs and of the gradients, each over the largest value,
        and the largest gradient of W_hh.
    """
    one, x, y = OneStep(type(model.rnn), x.shape[1], model.rnn.hidden_size), x.double(), y.double()
    one.load_state_dict(model.state_dict())
    plain = Plain(one.double()).double()
    outputs = [network(x) for network in (one, plain)]
    for output in outputs:
        nn.functional.mse_loss(output, y).backward()
    rnn = one.rnn
    pairs = [
        (rnn.weight_ih_l0.grad, plain.gates.weight.grad),
        (rnn.bias_ih_l0.grad, plain.gates.bias.grad),
        (rnn.bias_hh_l0.grad, plain.hidden_bias.grad),
        (one.linear.weight.grad, plain.linear.weight.grad),
    ]

    def difference(a: Tensor, b: Tensor) -> float:
        return ((a - b).abs().max() / b.abs().max()).item()

    recurrent = rnn.weight_hh_l0.grad.abs().max().item()
    return difference(*outputs), max(difference(a, b) for a, b in pairs), recurrent


def main(argv: list[str] | None = None) -> None:
    args, config, resumed = start("one_step", __doc__, OPTIONS, argv)
    series = Series(SERIES)
    numbers = series.network()[:, 0, 0]
    x, y = numbers.unfold(0, CYCLE, 1)[:-1], numbers[CYCLE:]
    parts = [
        slice(None, series.train - CYCLE),
        slice(series.train - CYCLE, series.validation - CYCLE),
    ]
    train, validation, test = *parts, slice(series.validation - CYCLE, None)
    rnn = getattr(fastrnn, config["cell"].upper())
    model = OneStep(rnn, CYCLE, config["hidden"])
    training = Training("one_step", model, config, series.values.tolist(), resumed)

    # The target is the change from the last year, so an untrained output of zero is the naive one.
    change = y - x[:, -1]

    def loss_of_a_batch() -> Tensor:
        batch = torch.randint(len(x[train]), (config["batch_size"],))
        return nn.functional.mse_loss(model(x[train][batch]), change[train][batch])

    def error(part: slice) -> float:
        return nn.functional.mse_loss(model(x[part]), change[part]).item()

    print(f"{SERIES.name}: {len(numbers)} values; the next year from {CYCLE} years", flush=True)
    training.run(loss_of_a_batch, lambda: error(validation), 20, args.checkpoint)

    outputs, gradients, recurrent = differences(model, x[test], change[test])
    print(f"\none step of {rnn.__name__} against torch.nn.Linear and the gates, in float64")
    print(f"  {outputs:8.1e}  largest difference of the outputs, over the largest output")
    print(f"  {gradients:8.1e}  largest difference of the gradients, over the largest gradient")
    print(f"  {recurrent:8.1e}  largest gradient of W_hh, which has no effect")
    with torch.no_grad():
        predicted = model(x[test]) + x[test][:, -1]
    scale = series.scale.item()
    ours = scale * (predicted - y[test]).square().mean().sqrt().item()
    naive = scale * change[test].square().mean().sqrt().item()
    title = f"One year ahead the error is {ours:.1f}, of the naive forecast {naive:.1f}"
    print(f"\n{title}.")
    if args.plot:
        with figure(args.plot, title, 1, 2, figsize=(11, 4.2)) as (left, right):
            training.draw(left, "mean square error")
            actual, forecast = (scale * v + series.mean for v in (y[test], predicted))
            right.plot([0, 200], [0, 200], color=GREY, label="correct")
            right.plot(actual, forecast, "o", color=RED, label="one step")
            right.plot(
                actual, scale * x[test][:, -1] + series.mean, "x", color=BLUE, label="as this year"
            )
            right.set(xlabel="sunspots, test years", ylabel="forecast")
            right.grid(alpha=0.3)


if __name__ == "__main__":
    run_program(main)
