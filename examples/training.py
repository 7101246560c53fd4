"""What the examples share: options, checkpoints, progress, and a training that can be stopped."""

from __future__ import annotations

import argparse
import hashlib
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
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

SAVE_EVERY = 200
BLUE, RED, GREEN, GREY, SAND = "#1d3557", "#e76f51", "#2a9d8f", "#8d99ae", "#f4a261"


class Option(NamedTuple):
    """One of the model or its training. A checkpoint keeps its value, and decides if none is given.

    Attributes:
        from_zero: whether a number may be zero; otherwise it is positive.
    """

    name: str
    default: Any
    meaning: str
    choices: tuple[str, ...] | None = None
    from_zero: bool = False


CELL = Option("cell", "lstm", "the recurrent layer", ("rnn", "gru", "lstm"))
NO_LIMIT = "; 0 for no limit"


def learning(steps: int, lr: float = 3e-3) -> list[Option]:
    """The options of every training, with the defaults of one."""
    most = "training steps in all, those of a resumed checkpoint included"
    return [
        Option("lr", lr, "Adam's learning rate"),
        Option("seed", 0, "of all that is random", from_zero=True),
        Option("steps", steps, most),
        Option("clip_norm", 1.0, f"most of all gradients' norm{NO_LIMIT}", from_zero=True),
        Option("clip_value", 0.0, f"most of a gradient's each element{NO_LIMIT}", from_zero=True),
    ]


def dropout(default: float, where: str) -> Option:
    return Option("dropout", default, f"dropout on {where}", from_zero=True)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def fail(message: str) -> NoReturn:
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {message}")


def add_options(parser: argparse.ArgumentParser, options: list[Option]) -> None:
    """Options of the model and its training, and where to save it and draw its plot."""
    add = parser.add_argument
    for option in options:
        # None tells an option that was not given, which a checkpoint may then decide.
        text = f"{option.meaning} (default {option.default})"
        add(_flag(option.name), type=type(option.default), choices=option.choices, help=text)
    when = f"save here every {SAVE_EVERY} steps, at the end and on Ctrl-C"
    add("--checkpoint", type=Path, metavar="PATH", help=f"{when} (default that of --resume)")
    more = "go on from this checkpoint; with as many --steps as are done, only show what it can do"
    add("--resume", type=Path, metavar="PATH", help=more)
    add("--plot", type=Path, metavar="PATH", help="draw the result here (.png, .pdf or .svg)")


def check_options(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    options: list[Option],
    from_zero: tuple[str, ...] = (),
) -> None:
    """Finds before the training what would fail after it: numbers, and what ``check_files`` does.

    Args:
        from_zero: arguments that are not options and may be zero.
    """
    args.checkpoint = args.checkpoint or args.resume
    zeros = {*from_zero, *(option.name for option in options if option.from_zero)}
    for name, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = 0 if name in zeros else 1e-6, 1 if name == "dropout" else math.inf
            if not low <= value < high:
                parser.error(f"{_flag(name)} cannot be {value}")
    check_files(parser, args.plot, args.checkpoint)


def check_files(
    parser: argparse.ArgumentParser, plot: Path | None, checkpoint: Path | None = None
) -> None:
    """Whether the plot and the checkpoint can be written, and what that needs is installed."""
    if plot and plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot {plot}: the name must end in .png, .pdf or .svg")
    for path in checkpoint, plot:
        if path and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            fail(f"cannot save {path}: no such folder, or not writable")
    for module in ["rich", "matplotlib"] if plot else ["rich"]:
        if importlib.util.find_spec(module) is None:
            fail(f"{module} is missing: pip install 'fastrnn[demo]'")


def configure(
    args: argparse.Namespace, options: list[Option], resumed: dict[str, Any] | None
) -> dict[str, Any]:
    """What was given, else what the checkpoint was trained with, else the defaults."""
    config = {option.name: option.default for option in options}
    config.update(resumed["config"] if resumed else {})
    for name, kept in config.items():
        given = getattr(args, name)
        if resumed and name != "steps" and given not in (None, kept):
            fail(f"{args.resume} was trained with {_flag(name)} {kept}, not {given}")
        config[name] = kept if given is None else given
    return config


def start(
    program: str,
    doc: str | None,
    options: list[Option],
    argv: list[str] | None,
    arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None,
    from_zero: tuple[str, ...] = (),
) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any] | None]:
    """What a program begins with: its arguments, the values of its options, and what it resumes.

    Args:
        doc: the program's docstring, whose first line says what it does.
        arguments: adds those that are not options of the training, of which those named
            ``from_zero`` may be zero.
    """
    parser = argparse.ArgumentParser(program, description=(doc or "").partition("\n")[0])
    arguments(parser)
    add_options(parser, options)
    args = parser.parse_args(argv)
    check_options(parser, args, options, from_zero)
    resumed = None
    if args.resume:
        resumed = {**load_checkpoint(args.resume, program, options), "path": args.resume}
    config = configure(args, options, resumed)
    torch.manual_seed(config["seed"])
    return args, config, resumed


def run_program(main: Callable[[], None]) -> None:
    """The program, without a traceback when Ctrl-C ends it."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


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
    if list(checkpoint.get("config", ())) != [option.name for option in options]:
        fail(f"{path} was saved by another version of this program")
    return checkpoint


@contextmanager
def figure(path: Path, title: str, *shape: int, **how: Any) -> Iterator[Any]:
    """The axes of a new plot, which is saved when they are drawn on, as all examples' look."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(*shape, layout="constrained", **how)
    yield axes
    for panel in drawn.axes:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(title, fontweight="bold")
    drawn.savefig(path, dpi=150)
    plt.close(drawn)
    print(f"Drawn in {path}.")


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


def stopped(where: str, checkpoint: Path | None) -> NoReturn:
    """After the step at which Ctrl-C ended a training, and a save."""
    how = f"go on with --resume {checkpoint}" if checkpoint else "nothing saved"
    print(f"interrupted after step {where}; {how}", flush=True)
    raise SystemExit(130)


def running_mean(losses: list[float], parts: int) -> tuple[range, Tensor]:
    """Over a part of the training, since single batches scatter: the steps, and their means."""
    window = max(1, len(losses) // parts)
    return range(window, len(losses) + 1), torch.tensor(losses).unfold(0, window, 1).mean(1)


def clip(model: nn.Module, config: dict[str, Any]) -> float:
    """Limits the gradients as the options say, first each element and then their norm.

    Returns:
        The norm of all gradients before that.
    """
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    norm = nn.utils.get_total_norm([weight.grad for weight in weights])
    if config["clip_value"]:
        nn.utils.clip_grad_value_(weights, config["clip_value"])
    if config["clip_norm"] and config["clip_value"]:
        nn.utils.clip_grad_norm_(weights, config["clip_norm"])
    elif config["clip_norm"]:
        nn.utils.clip_grads_with_norm_(weights, config["clip_norm"], norm)
    # Of sharded parameters, with which each process knows a part.
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def digest(data: object) -> str:
    """Tells data from other data, by what is printed of them."""
    return hashlib.sha256(repr(data).encode()).hexdigest()


class Training:
    """Adam's steps on one model, saved as they are made, with the weights that validate best.

    Args:
        data: what is learnt from; a checkpoint is refused that was trained on other data.
        resumed: the checkpoint to go on from, if any.
    """

    def __init__(
        self,
        program: str,
        model: nn.Module,
        config: dict[str, Any],
        data: object,
        resumed: dict[str, Any] | None,
    ) -> None:
        self.program, self.model, self.config = program, model, config
        self.data = digest(data)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.best = {name: w.clone() for name, w in model.state_dict().items()}
        if resumed:
            self.load(resumed)

    def state(self) -> dict[str, Any]:
        return {
            "program": self.program,
            "config": self.config,
            "data": self.data,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "losses": self.losses,
            "validation": self.validation,
            "best": self.best,
        }

    def load(self, state: dict[str, Any]) -> None:
        if state["data"] != self.data:
            fail(f"{state['path']} was trained on other data")
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
                if step % every == 0:
                    self.validate(validate)
                report(step)
                if step % SAVE_EVERY == 0:
                    save()
            save()
        if len(self.losses) < steps:
            stopped(f"{len(self.losses)}", checkpoint)
        # Not in the checkpoint: with more steps there would be no validation here.
        if [step for step, _ in self.validation[-1:]] != [len(self.losses)]:
            self.validate(validate)
        self.model.load_state_dict(self.best)
        self.model.eval()

    def validate(self, validate: Callable[[], float]) -> None:
        """Notes the error of the weights as they are, and keeps them if it is the least so far."""
        self.model.eval()
        with torch.no_grad():
            error = validate()
        self.model.train()
        if error < min((e for _, e in self.validation if not math.isnan(e)), default=math.inf):
            self.best = {name: w.clone() for name, w in self.model.state_dict().items()}
        self.validation.append((len(self.losses), error))

    def draw(self, panel: Any, what: str = "loss") -> None:
        """The losses, and what validation said."""
        panel.plot(*running_mean(self.losses, 50), color=BLUE, label="training")
        panel.plot(*zip(*self.validation, strict=True), color=RED, marker=".", label="validation")
        panel.set(xlabel="training step", ylabel=what)
        panel.grid(alpha=0.3)
