#!/usr/bin/env python
"""One to one: a recurrent layer that takes one step is a plain network, here on the sunspots.

    eleven years' numbers -> one step of LSTM (or GRU, or RNN) -> linear -> the next year's number

From a state of zero nothing is carried: an RNN is then a layer of tanh, an LSTM and a GRU are
layers with gates, and W_hh takes no part. The program trains the recurrent layer, copies its
weights into torch.nn.Linear layers, and shows that both say the same and have the same gradients.
It is held against the naive forecast; `forecast.py` carries the state from year to year.
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
    Option("hidden", 32, "its hidden_size"),
    Option("batch_size", 32, "of a training step"),
    *learning(600),
]


class OneStep(nn.Module):
    def __init__(self, rnn: type[nn.Module], inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn = rnn(inputs, hidden)
        self.linear = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, I]. Returns [B]."""
        output, _ = self.rnn(x[None])  # a time of one step
        value: Tensor = self.linear(output[0])
        return value.squeeze(1)


class Plain(nn.Module):
    """The same without recurrence: a linear layer, the gates, a linear layer."""

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
    """Between both networks in float64: outputs, gradients; and how large the gradient of W_hh is.

    Of the outputs and gradients the largest difference over the largest value.
    """
    one, x, y = OneStep(type(model.rnn), x.shape[1], model.rnn.hidden_size), x.double(), y.double()
    one.load_state_dict(model.state_dict())
    plain = Plain(one.double()).double()
    said = [network(x) for network in (one, plain)]
    for out in said:
        nn.functional.mse_loss(out, y).backward()
    rnn = one.rnn
    pairs = [
        (rnn.weight_ih_l0.grad, plain.gates.weight.grad),
        (rnn.bias_ih_l0.grad, plain.gates.bias.grad),
        (rnn.bias_hh_l0.grad, plain.hidden_bias.grad),
        (one.linear.weight.grad, plain.linear.weight.grad),
    ]

    def apart(a: Tensor, b: Tensor) -> float:
        return ((a - b).abs().max() / b.abs().max()).item()

    recurrent = rnn.weight_hh_l0.grad.abs().max().item()
    return apart(*said), max(apart(a, b) for a, b in pairs), recurrent


def main(argv: list[str] | None = None) -> None:
    args, config, resumed = start("one_step", __doc__, OPTIONS, argv)
    series = Series(SERIES)
    numbers = series.network()[:, 0, 0]
    x, y = numbers.unfold(0, CYCLE, 1)[:-1], numbers[CYCLE:]
    parts = [
        slice(None, series.train - CYCLE),
        slice(series.train - CYCLE, series.validation - CYCLE),
    ]
    learn, choose, judge = *parts, slice(series.validation - CYCLE, None)
    rnn = getattr(fastrnn, config["cell"].upper())
    model = OneStep(rnn, CYCLE, config["hidden"])
    training = Training("one_step", model, config, series.values.tolist(), resumed)

    # It learns the change from the last year, so that to know nothing is the naive forecast.
    change = y - x[:, -1]

    def loss_of_a_batch() -> Tensor:
        some = torch.randint(len(x[learn]), (config["batch_size"],))
        return nn.functional.mse_loss(model(x[learn][some]), change[learn][some])

    def error(part: slice) -> float:
        return nn.functional.mse_loss(model(x[part]), change[part]).item()

    print(f"{SERIES.name}: {len(numbers)} values; {CYCLE} years say the next", flush=True)
    training.run(loss_of_a_batch, lambda: error(choose), 20, args.checkpoint)

    outputs, gradients, recurrent = differences(model, x[judge], change[judge])
    print(f"\n{rnn.__name__} of one step against torch.nn.Linear and the gates, in float64")
    print(f"  {outputs:8.1e}  largest difference of the outputs, over the largest output")
    print(f"  {gradients:8.1e}  the same of the gradients")
    print(f"  {recurrent:8.1e}  largest gradient of W_hh, which takes no part")
    with torch.no_grad():
        said = model(x[judge]) + x[judge][:, -1]
    scale = series.scale.item()
    ours = scale * (said - y[judge]).square().mean().sqrt().item()
    naive = scale * change[judge].square().mean().sqrt().item()
    title = f"One year ahead the error is {ours:.1f}, of the naive forecast {naive:.1f}"
    print(f"\n{title}.")
    if args.plot:
        with figure(args.plot, title, 1, 2, figsize=(11, 4.2)) as (left, right):
            training.draw(left, "mean square error")
            actual, found = (scale * each + series.mean for each in (y[judge], said))
            right.plot([0, 200], [0, 200], color=GREY, label="right")
            right.plot(actual, found, "o", color=RED, label="one step")
            right.plot(
                actual, scale * x[judge][:, -1] + series.mean, "x", color=BLUE, label="as this year"
            )
            right.set(xlabel="sunspots, test years", ylabel="forecast")
            right.grid(alpha=0.3)


if __name__ == "__main__":
    run_program(main)
