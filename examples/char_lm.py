#!/usr/bin/env python
"""Train a character-level language model twice, with torch.nn and with fastrnn.

    embedding -> LSTM (or GRU, or RNN) -> linear -> softmax over the next character

Both trainings start from the same seed and see the same batches. So their loss curves must
coincide and only the time may differ. The program checks the curves, measures the time, and then
generates text. The time is that of a whole training step, with the embedding, the linear layer,
clipping and Adam. The program reads any UTF-8 text file, by default Paradise Lost. Under torchrun
the processes share each batch:

    torchrun --nproc-per-node 2 examples/char_lm.py
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from processes import Processes
from sequences import DATA, by_frequency, numbered, read_text
from torch import Tensor, nn
from torch.nn import functional as F
from training import (
    BLUE,
    CELL,
    SAND,
    SAVE_EVERY,
    Option,
    add_options,
    check_options,
    clip,
    configure,
    digest,
    dropout,
    fail,
    figure,
    interruptible,
    learning,
    load_checkpoint,
    progress,
    run_program,
    running_mean,
    save_checkpoint,
    stopped,
)

import fastrnn

BOOK = DATA / "paradise_lost.txt"
OPTIONS = [
    CELL,
    Option("hidden", 256, "hidden_size of the layer"),
    Option("layers", 1, "num_layers of the layer"),
    Option("embedding", 64, "input_size of the layer, the size of a character embedding"),
    dropout(0.0, "the input and output of the layer"),
    Option("batch_size", 32, "contiguous streams of the text, read in parallel"),
    Option("seq_len", 128, "characters per training step and stream"),
    *learning(500),
]

# Bounds within which two curves coincide. Two correct float32 trainings round differently. The
# differences are tiny at first (torch's oneDNN LSTM against its native one: 5e-7 in the loss, 8e-6
# in the gradient norm over 50 steps), so the early bounds are tight. Adam hides a gradient that is
# wrong by a constant factor, so the norm is compared too: an error of 0.1 % in the gradient of W_hh
# alone changes it by 3e-4. After a few hundred steps, or after ten at ten times the default --lr,
# the trainings diverge chaotically: single losses differ by up to 4e-2, and the mean over the last
# tenth by up to 4e-3. The last bound allows for that.
EARLY_STEPS, EARLY_LOSS, EARLY_NORM, END_LOSS = 50, 2e-5, 1e-4, 0.03

Hidden = Tensor | tuple[Tensor, Tensor] | None


class CharLM(nn.Module):
    def __init__(self, rnn: type[nn.Module], vocab_size: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config["embedding"])
        self.rnn = rnn(config["embedding"], config["hidden"], config["layers"])
        self.dropout = nn.Dropout(config["dropout"])
        self.linear = nn.Linear(config["hidden"], vocab_size)

    def forward(self, ids: Tensor, hidden: Hidden = None) -> tuple[Tensor, Hidden]:
        """ids: [T, B] characters. Returns the logits of the next characters, [T, B, vocab_size]."""
        output, hidden = self.rnn(self.dropout(self.embedding(ids)), hidden)
        return self.linear(self.dropout(output)), hidden


class Run:
    """One training: its state, and its results so far."""

    def __init__(
        self, backend: str, vocab_size: int, config: dict[str, Any], processes: Processes
    ) -> None:
        rnn = getattr(nn if backend == "torch" else fastrnn, config["cell"].upper())
        self.name = f"{'torch.nn' if backend == 'torch' else backend}.{rnn.__name__}"
        self.config, self.processes = config, processes
        torch.manual_seed(config["seed"])
        model = CharLM(rnn, vocab_size, config)
        self.rnn = model.rnn
        self.model = processes.parallel(model)
        torch.manual_seed(config["seed"] + processes.rank)  # dropout differs, the weights do not
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config["lr"])
        self.hidden: Hidden = None
        self.windows: Iterator[tuple[Tensor, Hidden]] | None = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    def state(self) -> dict[str, Any]:
        whole = self.processes.whole
        parts = self.hidden if isinstance(self.hidden, tuple) else (self.hidden,)
        return {
            **self.processes.state(self.model, self.optimizer),
            # The random state for dropout, one per process.
            "rng": [whole(get()[None], 0) for get, _ in self.processes.generators()],
            "step": self.step,
            "hidden": [whole(part, 1) for part in parts if part is not None],
            **{key: getattr(self, key) for key in ("losses", "norms", "seconds")},
        }

    def load(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)  # the optimizer would write into the checkpoint
        self.processes.load(self.model, self.optimizer, state)
        for saved, (_, put) in zip(state["rng"], self.processes.generators(), strict=False):
            if self.processes.rank < len(saved):
                put(saved[self.processes.rank].clone())  # torch rejects a view
        device = self.processes.device
        hidden = tuple(self.processes.share(part, 1).to(device) for part in state["hidden"])
        self.hidden = hidden if len(hidden) > 1 else hidden[0] if hidden else None
        self.losses, self.norms, self.seconds = state["losses"], state["norms"], state["seconds"]

    def through_time(self, data: Tensor) -> Iterator[tuple[Tensor, Hidden]]:
        """Yields the loss of each window of the streams of this process, forever."""
        T = self.config["seq_len"]
        mine = self.processes.share(data, 1).to(self.processes.device)
        last = (len(data) - 1) // T * T
        begin = self.step * T % last

        def loss(x: Tensor, y: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
            logits, hidden = self.model(x, hidden)
            return F.cross_entropy(logits.flatten(0, 1), y.flatten()), hidden

        while True:
            # The state, but not its gradient, passes to the next window. The streams start without
            # a state.
            windows = (mine[begin:last], mine[begin + 1 : last + 1])
            yield from fastrnn.tbptt(loss, windows, T, self.hidden if begin else None)
            begin = 0

    def train_step(self, data: Tensor) -> None:
        """Truncated back-propagation through time over the next window of data [N, B]."""
        started = time.perf_counter()
        self.windows = self.windows or self.through_time(data)
        self.optimizer.zero_grad()
        loss, self.hidden = next(self.windows)
        loss.backward()
        self.norms.append(clip(self.model, self.config))
        self.optimizer.step()
        self.losses.append(self.processes.mean(loss))
        self.seconds.append(time.perf_counter() - started)

    @torch.no_grad()
    def evaluate(self, ids: Tensor) -> float:
        """Mean cross-entropy per character in nats, with the state carried through ids."""
        seq_len = self.config["seq_len"]
        data = streams(ids, max(1, min(self.config["batch_size"], len(ids) // (seq_len + 1))))
        data = data.to(self.processes.device)
        self.model.eval()
        total, hidden = 0.0, None
        for start in range(0, len(data) - 1, seq_len):
            y = data[start + 1 : start + seq_len + 1]
            logits, hidden = self.model(data[start : start + len(y)], hidden)
            total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        self.model.train()
        return total / data[1:].numel()

    @torch.no_grad()
    def write(self, prompt: Tensor, length: int, temperature: float) -> list[int]:
        """Sample length characters, one at a time, after reading the prompt [T]."""
        generator = torch.Generator().manual_seed(self.config["seed"])
        self.model.eval()
        ids, hidden, written = prompt[:, None], None, []
        for _ in range(length):
            logits, hidden = self.model(ids.to(self.processes.device), hidden)
            p = torch.softmax(logits[-1].cpu() / temperature, -1)
            ids = torch.multinomial(p, 1, generator=generator)
            written.append(int(ids))
        self.model.train()
        return written


def streams(ids: Tensor, batch_size: int) -> Tensor:
    """Cut ids into batch_size contiguous streams: [len // batch_size, B]."""
    length = len(ids) // batch_size
    return ids[: length * batch_size].view(batch_size, length).t().contiguous()


def long_enough(path: Path, config: dict[str, Any]) -> str:
    text = read_text(path)
    need = math.ceil(config["batch_size"] * (config["seq_len"] + 1) / 0.9) + 20
    if len(text) < need:
        sizes = f"--batch-size {config['batch_size']} and --seq-len {config['seq_len']}"
        fail(f"{path} is too short: it has {len(text)} characters, {sizes} need {need}")
    return text


def train(run: Run, data: Tensor, steps: int, save: Callable[[], None]) -> bool:
    """Train up to a total of steps. False if Ctrl-C stopped it; the last step is then saved."""

    def numbers() -> str:
        return f"loss {run.losses[-1]:.3f}  {1e3 * median(run.seconds[-50:]):6.2f} ms/step"

    with interruptible() as interrupted:
        with progress(run.name, run.step, steps, numbers) as report:
            while run.step < steps and not run.processes.any(interrupted()):
                run.train_step(data)
                report(run.step)
                if run.step % SAVE_EVERY == 0:
                    save()
        save()
        return run.step >= steps


def interleaved(
    vocab_size: int, config: dict[str, Any], data: Tensor, processes: Processes
) -> list[float]:
    """Median seconds per step of both, in alternation, so that both see the same other load."""
    runs = [Run(backend, vocab_size, config, processes) for backend in ("torch", "fastrnn")]
    for _ in range(35):
        for run in runs:
            run.train_step(data)
    return [median(run.seconds[5:]) for run in runs]


def compare_curves(runs: list[Run]) -> bool:
    """Print the differences of the curves; true if they coincide (see the bounds at the top)."""
    losses = list(zip(*(run.losses for run in runs), strict=False))
    norms = list(zip(*(run.norms for run in runs), strict=False))[:EARLY_STEPS]
    last = losses[-max(1, len(losses) // 10) :]
    early = max(abs(a - b) for a, b in losses[:EARLY_STEPS])
    norm = max(abs(a - b) / max(abs(a), 1e-12) for a, b in norms)
    end = abs(fmean(a - b for a, b in last))
    print("\nDo the loss curves coincide?")
    coincide = True
    for value, bound, what in (
        (early, EARLY_LOSS, f"largest difference in the first {len(norms)} steps"),
        (norm, EARLY_NORM, "the same for the gradient norm, relative"),
        (end, END_LOSS, f"difference of the means over the last {len(last)} steps"),
    ):
        within = value <= bound  # false for NaN
        coincide &= within
        print(f"  {'yes' if within else 'NO '}  {value:.1e} (bound {bound:.0e})  {what}")
    worst = max(abs(a - b) for a, b in losses)
    print(f"       {worst:.1e}                largest difference in all {len(losses)} steps")
    return coincide


def print_table(runs: list[Run], nats: list[float], constant: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", title=f"{runs[0].step} steps; validation: the last tenth of the text")
    for run in runs:
        table.add_column(run.name, justify="right")
    for what, form, values in (
        ("training step, median, ms", ".2f", [1e3 * median(run.seconds) for run in runs]),
        ("first loss, nats", ".5f", [run.losses[0] for run in runs]),
        ("mean of the last 50 losses, nats", ".5f", [fmean(run.losses[-50:]) for run in runs]),
        ("validation, bits per character", ".4f", [value / math.log(2) for value in nats]),
        ("validation, perplexity", ".4f", [math.exp(value) for value in nats]),
        ("perplexity by character frequency", ".4f", [math.exp(constant) for _ in nats]),
    ):
        table.add_row(what, *(format(value, form) for value in values))
    Console(highlight=False).print(table)


def plot(path: Path, runs: list[Run], step_seconds: list[float], title: str) -> None:
    styles = [(SAND, 6.0, "-"), (BLUE, 1.5, "--")]
    with figure(path, title, 1, 2, figsize=(11, 4.5), sharey=True) as (left, right):
        for run, seconds, (color, lw, ls) in zip(runs, step_seconds, styles, strict=False):
            step, loss = running_mean(run.losses, 100)
            label = f"{run.name}, {1e3 * seconds:.1f} ms a step"
            left.plot(step, loss, label=run.name, color=color, lw=lw, ls=ls)
            right.plot(torch.tensor(step) * seconds, loss, label=label, color=color, lw=lw, ls=ls)
        left.set(xlabel="training step", ylabel="training loss, nats per character")
        right.set(xlabel="seconds, at the median time of a step")
        for panel in (left, right):
            panel.grid(alpha=0.3)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="A checkpoint has one training per backend. --resume with --backend both resumes"
        " those that it has and starts the other. --resume with one backend that it does not have"
        " starts from the training of the other, since both have the same state_dict. The options"
        " of model and training come from the checkpoint. Only --steps can be changed; if that many"
        " steps are done already, the model is only evaluated and generates text.",
    )
    add = parser.add_argument
    add("text", nargs="?", type=Path, default=BOOK, help=f"UTF-8 text file (default {BOOK.name})")
    add_options(parser, OPTIONS)
    both = "train with torch.nn, with fastrnn, or with one after the other (default both)"
    add("--backend", choices=["torch", "fastrnn", "both"], default="both", help=both)
    add("--write", type=int, default=500, metavar="N", help="characters to generate (default 500)")
    add("--prompt", metavar="TEXT", help="start of the generated text (default a new line)")
    add("--temperature", type=float, default=0.7, help="sampling temperature (default 0.7)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default cpu)")
    add("--fsdp", action="store_true", help="under torchrun, shard the parameters over processes")
    args = parser.parse_args(argv)
    check_options(parser, args, OPTIONS, ("write",))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with Processes(args.device, args.fsdp) as processes:
        run_on(args, processes)


def run_on(args: argparse.Namespace, processes: Processes) -> None:
    resumed = load_checkpoint(args.resume, "char_lm", OPTIONS) if args.resume else None
    config = configure(args, OPTIONS, resumed)
    if config["batch_size"] % processes.size:
        fail(f"--batch-size {config['batch_size']} cannot be shared by {processes.size} processes")
    text = long_enough(args.text, config)
    vocab, ids = numbered(text)
    data_digest = digest(text)
    if resumed and data_digest != resumed["data"]:
        fail(f"{args.resume} was trained on another text than {args.text}")
    prompt = args.prompt or ("\n" if "\n" in vocab else text[0])
    if not set(prompt) <= set(vocab):
        fail(f"--prompt {prompt!r} has characters that do not occur in {args.text}")
    split = len(ids) * 9 // 10
    data, validation = streams(ids[:split], config["batch_size"]), ids[split:]
    layers = f"{config['layers']} x " if config["layers"] > 1 else ""
    model = f"{layers}{config['cell'].upper()}({config['embedding']}, {config['hidden']})"
    batch = f"batches of {config['batch_size']} x {config['seq_len']}"
    print(f"{args.text.name}: {len(text):,} characters, {len(vocab)} different", flush=True)
    on = f"threads {torch.get_num_threads()}"
    on += f" in each of {processes.size} processes" if processes.started else ""
    print(f"{model}, {batch}, seed {config['seed']}, {on}\n", flush=True)

    states = resumed["runs"] if resumed else {}
    runs: list[Run] = []
    for backend in ["torch", "fastrnn"] if args.backend == "both" else [args.backend]:
        runs.append(run := Run(backend, len(vocab), config, processes))
        if backend in states:
            run.load(states[backend])
        elif states and args.backend != "both":
            run.load(next(iter(states.values())))

        def save(run: Run = run, backend: str = backend) -> None:
            if args.checkpoint:
                states[backend] = run.state()
                content = {"program": "char_lm", "config": config, "data": data_digest}
                if processes.rank == 0:
                    save_checkpoint(args.checkpoint, {**content, "runs": states})

        if not train(run, data, config["steps"], save):
            stopped(f"{run.step} of {run.name}", args.checkpoint)
    print()
    constant = by_frequency(ids[:split], validation, len(vocab))
    print_table(runs, [run.evaluate(validation) for run in runs], constant)

    title, coincide = f"{model} on {args.text.name}", True
    step_seconds = [median(run.seconds) for run in runs]
    if len(runs) == 2:
        coincide = compare_curves(runs)
        step_seconds = interleaved(len(vocab), config, data, processes)
        ratio = step_seconds[0] / step_seconds[1]
        times = " and ".join(f"{1e3 * seconds:.2f} ms" for seconds in step_seconds)
        print(f"\nA whole training step, in alternation (medians of 30): {times}.")
        print(f"{runs[1].name} is {ratio:.2f} times as fast as {runs[0].name}.")
        sizes = config["seq_len"], config["batch_size"] // processes.size, config["embedding"]
        x = torch.zeros(*sizes, device=processes.device)
        print(f"Backend: {fastrnn.explain(runs[1].rnn, x)}")
        title += f": a training step is {ratio:.2f} times as fast with fastrnn"
    if args.plot and processes.rank == 0:
        plot(args.plot, runs, step_seconds, title)
    if args.write:
        ids = torch.tensor([vocab.index(character) for character in prompt])
        written = runs[-1].write(ids, args.write, args.temperature)
        print(f"\n{runs[-1].name} writes:\n{prompt}{''.join(vocab[i] for i in written)}")
    if not coincide:
        hint = "fastrnn is wrong, or --lr is so high that rounding decides: try a lower one"
        fail(f"the loss curves do not coincide, see NO above; {hint}")


if __name__ == "__main__":
    run_program(main)
