#!/usr/bin/env python
"""Train a character-level language model twice, with torch.nn's layer and with fastrnn's.

    embedding -> LSTM (or GRU, or RNN) -> linear -> softmax over the next character

Both trainings start from the same seed and see the same batches. So their loss curves must
coincide, and only the time differs: the program checks the first, measures the second, and lets
the trained model write. The time is that of a whole training step, with the embedding, the linear
layer, clipping and Adam. It reads any UTF-8 text file; without one it reads Paradise Lost.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import importlib.util
import io
import math
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BOOK = Path(__file__).parent / "data" / "paradise_lost.txt"
# The options that a checkpoint keeps: name, default, meaning.
OPTIONS: list[tuple[str, Any, str]] = [
    ("cell", "lstm", "the recurrent layer"),
    ("hidden", 256, "its hidden_size"),
    ("layers", 1, "its num_layers"),
    ("embedding", 64, "its input_size, the size of a character's embedding"),
    ("dropout", 0.0, "dropout on its input and output"),
    ("batch_size", 32, "contiguous streams of the text that are read side by side"),
    ("seq_len", 128, "characters per training step and stream"),
    ("lr", 3e-3, "Adam's learning rate"),
    ("seed", 0, "of the initial weights, of dropout and of the writing"),
    ("steps", 500, "training steps in all, those of a resumed checkpoint included"),
]
CLIP = 1.0
SAVE_EVERY = 200

# When do two curves coincide? Two right float32 trainings round differently. At first that stays
# tiny (torch's oneDNN LSTM against torch's native one: 5e-7 in the loss, 8e-6 in the gradient norm
# over 50 steps), so the early bounds are tight. Adam hides a gradient that is wrong by a constant
# factor, hence the norm: 0.1 % too much in the gradient of W_hh alone moves it by 3e-4. After some
# hundred steps, or at ten times the default --lr after ten, chaos takes over: single losses then
# differ by up to 4e-2 and the mean over the last tenth by up to 4e-3: hence the last bound.
EARLY_STEPS, EARLY_LOSS, EARLY_NORM, END_LOSS = 50, 2e-5, 1e-4, 0.03

Hidden = Tensor | tuple[Tensor, Tensor] | None


def fail(message: str) -> NoReturn:
    raise SystemExit(f"char_lm: {message}")


class CharLM(nn.Module):
    def __init__(self, rnn: type[nn.Module], vocab_size: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, config["embedding"])
        self.rnn = rnn(config["embedding"], config["hidden"], config["layers"])
        self.dropout = nn.Dropout(config["dropout"])
        self.linear = nn.Linear(config["hidden"], vocab_size)

    def forward(self, ids: Tensor, hidden: Hidden = None) -> tuple[Tensor, Hidden]:
        """ids: [T, B] characters. Returns the logits of the next ones, [T, B, vocab_size]."""
        output, hidden = self.rnn(self.dropout(self.embedding(ids)), hidden)
        return self.linear(self.dropout(output)), hidden


class Run:
    """One training: everything that a later training step depends on, and what came out so far."""

    def __init__(self, backend: str, vocab_size: int, config: dict[str, Any]) -> None:
        module = nn if backend == "torch" else importlib.import_module(backend)
        rnn = getattr(module, config["cell"].upper())
        self.name = f"{'torch.nn' if backend == 'torch' else backend}.{rnn.__name__}"
        self.config = config
        torch.manual_seed(config["seed"])
        self.model = CharLM(rnn, vocab_size, config)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config["lr"])
        self.hidden: Hidden = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),  # for dropout
            "step": self.step,
            **{key: getattr(self, key) for key in ("hidden", "losses", "norms", "seconds")},
        }

    def load(self, state: dict[str, Any]) -> None:
        state = copy.deepcopy(state)  # the optimizer would go on to write into it
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.hidden, self.losses = state["hidden"], state["losses"]
        self.norms, self.seconds = state["norms"], state["seconds"]

    def train_step(self, data: Tensor) -> None:
        """Truncated backpropagation through time over the next window of data [N, B]."""
        began = time.perf_counter()
        seq_len = self.config["seq_len"]
        start = self.step % ((len(data) - 1) // seq_len) * seq_len
        if start == 0:  # every stream is at its first character again
            self.hidden = None
        x, y = data[start : start + seq_len], data[start + 1 : start + seq_len + 1]
        self.optimizer.zero_grad()
        logits, hidden = self.model(x, self.hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        # The state goes on into the next window, its gradient does not.
        if isinstance(hidden, tuple):
            self.hidden = hidden[0].detach(), hidden[1].detach()
        else:
            self.hidden = hidden.detach()
        self.losses.append(loss.item())
        self.norms.append(norm.item())
        self.seconds.append(time.perf_counter() - began)

    @torch.no_grad()
    def evaluate(self, ids: Tensor) -> float:
        """Mean cross-entropy per character, in nats, reading ids with the state carried on."""
        seq_len = self.config["seq_len"]
        data = streams(ids, max(1, min(self.config["batch_size"], len(ids) // (seq_len + 1))))
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
        """Draws length characters, one at a time, after reading the prompt [T]."""
        generator = torch.Generator().manual_seed(self.config["seed"])
        self.model.eval()
        ids, hidden, written = prompt[:, None], None, []
        for _ in range(length):
            logits, hidden = self.model(ids, hidden)
            p = torch.softmax(logits[-1] / temperature, -1)
            ids = torch.multinomial(p, 1, generator=generator)
            written.append(int(ids))
        self.model.train()
        return written


def streams(ids: Tensor, batch_size: int) -> Tensor:
    """Cuts ids into batch_size contiguous streams, read side by side: [len // batch_size, B]."""
    length = len(ids) // batch_size
    return ids[: length * batch_size].view(batch_size, length).t().contiguous()


def read_text(path: Path, config: dict[str, Any]) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"cannot read the text {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}")
    need = math.ceil(config["batch_size"] * (config["seq_len"] + 1) / 0.9) + 20
    if len(text) < need:
        sizes = f"--batch-size {config['batch_size']} and --seq-len {config['seq_len']}"
        fail(f"{path} is too short: it has {len(text)} characters, {sizes} need {need}")
    return text


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Replaces path in one move, so that it is whole whenever the program is stopped."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        fail(f"cannot save the checkpoint {path}: {error.strerror}")
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        fail(f"cannot read the checkpoint {path}: {error.strerror}")
    try:
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.PickleError) as error:
        fail(f"{path} is not a checkpoint, or it is damaged ({type(error).__name__})")
    if not isinstance(checkpoint, dict) or checkpoint.get("program") != "char_lm":
        fail(f"{path} is not a checkpoint of this program")
    if list(checkpoint["config"]) != [name for name, _, _ in OPTIONS]:
        fail(f"{path} was saved by another version of this program")
    return checkpoint


@contextmanager
def progress(run: Run, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal; elsewhere ten plain lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    def numbers() -> str:
        return f"loss {run.losses[-1]:.3f}  {1e3 * median(run.seconds[-50:]):6.2f} ms/step"

    def plain() -> None:
        if run.step % max(1, steps // 10) == 0 or run.step == steps:
            left = (steps - run.step) * median(run.seconds[-50:])
            print(
                f"{run.name:13} {run.step:>6}/{steps}  {numbers()}  {left:4.0f} s left", flush=True
            )

    console = Console(highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield plain
        return
    columns = (run.name, BarColumn(None), MofNCompleteColumn(), "{task.fields[numbers]}")
    eta = TimeRemainingColumn(compact=True)
    with Progress(*columns, eta, console=console, refresh_per_second=4, expand=True) as bar:
        task = bar.add_task("", total=steps, completed=run.step, numbers="")
        yield lambda: bar.update(task, completed=run.step, numbers=numbers())


def train(run: Run, data: Tensor, steps: int, save: Callable[[], None]) -> bool:
    """Trains up to steps in all; false if Ctrl-C ended it, after a whole step and a save."""
    interrupted: list[bool] = []

    def interrupt(*_: object) -> None:
        interrupted.append(True)  # and a second one ends it at once
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with progress(run, steps) as report:
            while run.step < steps and not interrupted:
                run.train_step(data)
                report()
                if run.step % SAVE_EVERY == 0:
                    save()
        save()
    finally:
        signal.signal(signal.SIGINT, before)
    return not interrupted


def interleaved(vocab_size: int, config: dict[str, Any], data: Tensor) -> list[float]:
    """Median seconds per step of both, taking turns, so that both meet the same other load."""
    runs = [Run(backend, vocab_size, config) for backend in ("torch", "fastrnn")]
    for _ in range(35):
        for run in runs:
            run.train_step(data)
    return [median(run.seconds[5:]) for run in runs]


def compare_curves(runs: list[Run]) -> bool:
    """Prints how far the curves are apart; true if they coincide (see the bounds at the top)."""
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
        within = value <= bound  # false for a NaN, which would stay to the end
        coincide &= within
        print(f"  {'yes' if within else 'NO '}  {value:.1e} (bound {bound:.0e})  {what}")
    worst = max(abs(a - b) for a, b in losses)
    print(f"       {worst:.1e}                largest difference in all {len(losses)} steps")
    return coincide


def print_table(runs: list[Run], nats: list[float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", title=f"{runs[0].step} steps; validation: the last tenth of the text")
    for run in runs:
        table.add_column(run.name, justify="right")
    for what, form, values in (
        ("a whole step, median, ms", ".2f", [1e3 * median(run.seconds) for run in runs]),
        ("first loss, nats", ".5f", [run.losses[0] for run in runs]),
        ("mean of the last 50 losses, nats", ".5f", [fmean(run.losses[-50:]) for run in runs]),
        ("validation, bits per character", ".4f", [value / math.log(2) for value in nats]),
        ("validation, perplexity", ".4f", [math.exp(value) for value in nats]),
    ):
        table.add_row(what, *(format(value, form) for value in values))
    Console(highlight=False).print(table)


def plot(path: Path, runs: list[Run], step_seconds: list[float], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for run, seconds, (color, width, dash) in zip(
        runs, step_seconds, [("#f4a261", 6.0, "-"), ("#1d3557", 1.5, "--")], strict=False
    ):
        # A running mean, because single batches scatter by more than the curve falls.
        window = max(1, run.step // 100)
        loss = torch.tensor(run.losses).unfold(0, window, 1).mean(1)
        step = torch.arange(window, run.step + 1)
        label, style = f"{run.name}, {1e3 * seconds:.1f} ms a step", {"lw": width, "ls": dash}
        panels[0].plot(step, loss, label=run.name, color=color, **style)
        panels[1].plot(step * seconds, loss, label=label, color=color, **style)
    panels[0].set(xlabel="training step", ylabel="training loss, nats per character")
    panels[1].set(xlabel="seconds, at the median time of a step")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, handlelength=4)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="A checkpoint holds one training per backend. --resume with --backend both goes on"
        " with each that it holds and begins the other; with one backend that it does not hold, it"
        " goes on from the other's, since the two have the same state_dict. The options of model"
        " and training are the checkpoint's then; only --steps may be changed, and where that many"
        " steps are done already the model is only evaluated and writes.",
    )
    add = parser.add_argument
    add("text", nargs="?", type=Path, default=BOOK, help=f"UTF-8 text file (default {BOOK.name})")
    for name, default, meaning in OPTIONS:
        # None tells an option that was not given, which a checkpoint may then decide.
        cells = ["rnn", "gru", "lstm"] if name == "cell" else None
        flag, text = f"--{name.replace('_', '-')}", f"{meaning} (default {default})"
        add(flag, type=type(default), choices=cells, help=text)
    both = "train with torch.nn, with fastrnn, or with one after the other (default both)"
    add("--backend", choices=["torch", "fastrnn", "both"], default="both", help=both)
    when = f"save here every {SAVE_EVERY} steps, at the end and on Ctrl-C"
    add("--checkpoint", type=Path, metavar="PATH", help=f"{when} (default that of --resume)")
    add("--resume", type=Path, metavar="PATH", help="go on from this checkpoint")
    add("--plot", type=Path, metavar="PATH", help="draw the loss curves here (.png, .pdf or .svg)")
    add("--write", type=int, default=500, metavar="N", help="characters to write (default 500)")
    add("--prompt", metavar="TEXT", help="what the writing goes on from (default a new line)")
    add("--temperature", type=float, default=0.7, help="of the writing (default 0.7)")
    args = parser.parse_args(argv)
    args.checkpoint = args.checkpoint or args.resume

    # What would fail after the training is found before it.
    for name, value in vars(args).items():
        low, high = 0 if name in ("dropout", "seed", "write") else 1e-6, math.inf
        if isinstance(value, int | float) and not low <= value < (1 if name == "dropout" else high):
            parser.error(f"--{name.replace('_', '-')} cannot be {value}")
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot {args.plot}: the name must end in .png, .pdf or .svg")
    for path in args.checkpoint, args.plot:
        if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            fail(f"cannot save {path}: no such folder, or not writable")
    for module in ["rich", "matplotlib"] if args.plot else ["rich"]:
        if importlib.util.find_spec(module) is None:
            fail(f"{module} is missing: pip install 'fastrnn[demo]'")
    if args.backend != "torch" and importlib.util.find_spec("fastrnn") is None:
        fail("fastrnn is not installed; --backend torch goes without")
    return args


def configure(args: argparse.Namespace, resumed: dict[str, Any] | None) -> dict[str, Any]:
    """What was given, else what the checkpoint was trained with, else the defaults."""
    config = {name: default for name, default, _ in OPTIONS}
    config.update(resumed["config"] if resumed else {})
    for name, kept in config.items():
        given = getattr(args, name)
        if resumed and name != "steps" and given not in (None, kept):
            flag = "--" + name.replace("_", "-")
            fail(f"{args.resume} was trained with {flag} {kept}, not {given}")
        config[name] = kept if given is None else given
    return config


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    resumed = load_checkpoint(args.resume) if args.resume else None
    config = configure(args, resumed)
    text = read_text(args.text, config)
    vocab, digest = "".join(sorted(set(text))), hashlib.sha256(text.encode()).hexdigest()
    if resumed and digest != resumed["text"]:
        fail(f"{args.resume} was trained on another text than {args.text}")
    prompt = args.prompt or ("\n" if "\n" in vocab else text[0])
    if not set(prompt) <= set(vocab):
        fail(f"--prompt {prompt!r} has characters that do not occur in {args.text}")
    index = {character: i for i, character in enumerate(vocab)}
    ids = torch.tensor([index[character] for character in text])
    split = len(ids) * 9 // 10
    data, validation = streams(ids[:split], config["batch_size"]), ids[split:]
    layers = f"{config['layers']} x " if config["layers"] > 1 else ""
    model = f"{layers}{config['cell'].upper()}({config['embedding']}, {config['hidden']})"
    batch = f"batches of {config['batch_size']} x {config['seq_len']}"
    print(f"{args.text.name}: {len(text):,} characters, {len(vocab)} different", flush=True)
    print(
        f"{model}, {batch}, seed {config['seed']}, threads {torch.get_num_threads()}\n", flush=True
    )

    states = resumed["runs"] if resumed else {}
    runs: list[Run] = []
    for backend in ["torch", "fastrnn"] if args.backend == "both" else [args.backend]:
        runs.append(run := Run(backend, len(vocab), config))
        if backend in states:
            run.load(states[backend])
        elif states and args.backend != "both":
            run.load(next(iter(states.values())))

        def save(run: Run = run, backend: str = backend) -> None:
            if args.checkpoint:
                states[backend] = run.state()
                content = {"program": "char_lm", "config": config, "text": digest}
                save_checkpoint(args.checkpoint, {**content, "runs": states})

        if not train(run, data, config["steps"], save):
            where = f"go on with --resume {args.checkpoint}" if args.checkpoint else "nothing saved"
            print(f"interrupted after step {run.step} of {run.name}; {where}", flush=True)
            raise SystemExit(130)
    print()
    print_table(runs, [run.evaluate(validation) for run in runs])

    title, coincide = f"{model} on {args.text.name}", True
    step_seconds = [median(run.seconds) for run in runs]
    if len(runs) == 2:
        coincide = compare_curves(runs)
        step_seconds = interleaved(len(vocab), config, data)
        ratio = step_seconds[0] / step_seconds[1]
        times = " and ".join(f"{1e3 * seconds:.2f} ms" for seconds in step_seconds)
        print(f"\nA whole training step, the two taking turns (medians of 30): {times}.")
        print(f"{runs[1].name} is {ratio:.2f} times as fast as {runs[0].name}.")
        x = torch.zeros(config["seq_len"], config["batch_size"], config["embedding"])
        why = importlib.import_module("fastrnn").explain(runs[1].model.rnn, x)
        print(f"It ran on the backend {why}.")
        title += f": a training step is {ratio:.2f} times as fast with fastrnn"
    if args.plot:
        plot(args.plot, runs, step_seconds, title)
        print(f"\nThe curves are drawn in {args.plot}.")
    if args.write:
        ids = torch.tensor([index[character] for character in prompt])
        written = runs[-1].write(ids, args.write, args.temperature)
        print(f"\n{runs[-1].name} writes:\n{prompt}{''.join(vocab[i] for i in written)}")
    if not coincide:
        hint = "fastrnn is wrong here, or --lr so high that rounding decides: try a lower one"
        fail(f"the loss curves do not coincide, see NO above; {hint}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
