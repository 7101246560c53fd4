"""What the examples share: options, checkpoints, progress, and a training that can be stopped."""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

Option = tuple[str, Any, str]
"""Name, default and meaning. A checkpoint keeps the values, and decides those not given."""

SAVE_EVERY = 200
CLIP: list[Option] = [
    ("clip_norm", 1.0, "most of the norm of all gradients together; 0 for no limit"),
    ("clip_value", 0.0, "most of each element of a gradient; 0 for no limit"),
]


def fail(message: str) -> NoReturn:
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {message}")


def add_options(parser: argparse.ArgumentParser, options: list[Option]) -> None:
    """Options of the model and its training, and where to save it and draw its plot."""
    add = parser.add_argument
    for name, default, meaning in options:
        # None tells an option that was not given, which a checkpoint may then decide.
        cells = ["rnn", "gru", "lstm"] if name == "cell" else None
        flag, text = f"--{name.replace('_', '-')}", f"{meaning} (default {default})"
        add(flag, type=type(default), choices=cells, help=text)
    when = f"save here every {SAVE_EVERY} steps, at the end and on Ctrl-C"
    add("--checkpoint", type=Path, metavar="PATH", help=f"{when} (default that of --resume)")
    add("--resume", type=Path, metavar="PATH", help="go on from this checkpoint")
    add("--plot", type=Path, metavar="PATH", help="draw the result here (.png, .pdf or .svg)")


def check_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, from_zero: tuple[str, ...] = ()
) -> None:
    """Finds before the training what would fail after it.

    Numbers are positive, those named may be zero, and a dropout is less than one.
    """
    args.checkpoint = args.checkpoint or args.resume
    from_zero = ("dropout", "seed", "clip_norm", "clip_value", *from_zero)
    for name, value in vars(args).items():
        low, high = 0 if name in from_zero else 1e-6, math.inf
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


def configure(
    args: argparse.Namespace, options: list[Option], resumed: dict[str, Any] | None
) -> dict[str, Any]:
    """What was given, else what the checkpoint was trained with, else the defaults."""
    config = {name: default for name, default, _ in options}
    config.update(resumed["config"] if resumed else {})
    for name, kept in config.items():
        given = getattr(args, name)
        if resumed and name != "steps" and given not in (None, kept):
            flag = "--" + name.replace("_", "-")
            fail(f"{args.resume} was trained with {flag} {kept}, not {given}")
        config[name] = kept if given is None else given
    return config


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


def load_checkpoint(path: Path, program: str, options: list[Option]) -> dict[str, Any]:
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        fail(f"cannot read the checkpoint {path}: {error.strerror}")
    try:
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.PickleError) as error:
        fail(f"{path} is not a checkpoint, or it is damaged ({type(error).__name__})")
    if not isinstance(checkpoint, dict) or checkpoint.get("program") != program:
        fail(f"{path} is not a checkpoint of this program")
    if list(checkpoint["config"]) != [name for name, _, _ in options]:
        fail(f"{path} was saved by another version of this program")
    return checkpoint


@contextmanager
def progress(
    name: str, done: int, steps: int, numbers: Callable[[], str]
) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; elsewhere ten plain lines. It is told the steps done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    began = time.perf_counter()

    def plain(step: int) -> None:
        if step % max(1, steps // 10) == 0 or step == steps:
            left = (steps - step) * (time.perf_counter() - began) / (step - done)
            print(f"{name:13} {step:>6}/{steps}  {numbers()}  {left:4.0f} s left", flush=True)

    console = Console(highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield plain
        return
    columns = (name, BarColumn(None), MofNCompleteColumn(), "{task.fields[numbers]}")
    eta = TimeRemainingColumn(compact=True)
    with Progress(*columns, eta, console=console, refresh_per_second=4, expand=True) as bar:
        task = bar.add_task("", total=steps, completed=done, numbers="")
        yield lambda step: bar.update(task, completed=step, numbers=numbers())


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether there was a Ctrl-C, which only notes that it came; a second one ends the program."""
    interrupted: list[bool] = []

    def interrupt(*_: object) -> None:
        interrupted.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(interrupted)
    finally:
        signal.signal(signal.SIGINT, before)


def clip(model: nn.Module, config: dict[str, Any]) -> None:
    """Limits the gradients as the options of CLIP say, first each element and then their norm."""
    if config["clip_value"]:
        nn.utils.clip_grad_value_(model.parameters(), config["clip_value"])
    if config["clip_norm"]:
        nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])


class Training:
    """Adam's steps on one model, saved as they are made, with the weights that validate best."""

    def __init__(self, program: str, model: nn.Module, config: dict[str, Any]) -> None:
        self.program, self.model, self.config = program, model, config
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.best = {name: w.clone() for name, w in model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        return {
            "program": self.program,
            "config": self.config,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "losses": self.losses,
            "validation": self.validation,
            "best": self.best,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.losses, self.validation = state["losses"], state["validation"]
        self.best = state["best"]

    def run(
        self,
        loss_of_a_batch: Callable[[], Tensor],
        validate: Callable[[], float],
        every: int,
        checkpoint: Path | None,
    ) -> None:
        """Steps up to those of the options, and then the best weights back into the model.

        Args:
            validate: an error, measured after each ``every`` steps.
        """
        steps = self.config["steps"]

        def numbers() -> str:
            shown = f"loss {self.losses[-1]:.4f}"
            return shown + (f"  validation {self.validation[-1][1]:.4f}" if self.validation else "")

        def save() -> None:
            if checkpoint:
                save_checkpoint(checkpoint, self.state())

        bar = progress(type(self.model).__name__, len(self.losses), steps, numbers)
        with interruptible() as interrupted, bar as report:
            while len(self.losses) < steps and not interrupted():
                self.optimizer.zero_grad()
                loss = loss_of_a_batch()
                loss.backward()  # type: ignore[no-untyped-call]
                clip(self.model, self.config)
                self.optimizer.step()
                self.losses.append(loss.item())
                step = len(self.losses)
                if step % every == 0 or step == steps:
                    self.model.eval()
                    with torch.no_grad():
                        error = validate()
                    self.model.train()
                    if error < min((e for _, e in self.validation), default=math.inf):
                        self.best = {n: w.clone() for n, w in self.model.state_dict().items()}
                    self.validation.append((step, error))
                report(step)
                if step % SAVE_EVERY == 0:
                    save()
            save()
        if len(self.losses) < steps:
            where = f"go on with --resume {checkpoint}" if checkpoint else "nothing saved"
            print(f"interrupted after step {len(self.losses)}; {where}", flush=True)
            raise SystemExit(130)
        self.model.load_state_dict(self.best)
        self.model.eval()
