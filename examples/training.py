"""Shared by the examples: options, checkpoints, progress, and an interruptible training."""

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
    """An option of the model or its training. If it is not given, the checkpoint's value applies.

    Attributes:
        from_zero: whether a number may be zero; otherwise it must be positive.
    """

    name: str
    default: Any
    meaning: str
    choices: tuple[str, ...] | None = None
    from_zero: bool = False


CELL = Option("cell", "lstm", "the recurrent layer", ("rnn", "gru", "lstm"))
NO_LIMIT = "; 0 for no limit"


def learning(steps: int, lr: float = 3e-3) -> list[Option]:
    """The options that every training has, with the defaults of this one."""
    total = "total training steps, including those of a resumed checkpoint"
    return [
        Option("lr", lr, "learning rate of Adam"),
        Option("seed", 0, "random seed", from_zero=True),
        Option("steps", steps, total),
        Option("clip_norm", 1.0, f"limit of the norm of all gradients{NO_LIMIT}", from_zero=True),
        Option("clip_value", 0.0, f"limit of each element of a gradient{NO_LIMIT}", from_zero=True),
    ]


def dropout(default: float, where: str) -> Option:
    return Option("dropout", default, f"dropout on {where}", from_zero=True)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def fail(message: str) -> NoReturn:
    raise SystemExit(f"{Path(sys.argv[0]).stem}: {message}")


def add_options(parser: argparse.ArgumentParser, options: list[Option]) -> None:
    """Add the options of the model and its training, and the paths of checkpoint and plot."""
    add = parser.add_argument
    for option in options:
        # None marks an option that was not given: the value of a checkpoint then applies.
        text = f"{option.meaning} (default {option.default})"
        add(_flag(option.name), type=type(option.default), choices=option.choices, help=text)
    when = f"save here every {SAVE_EVERY} steps, at the end and on Ctrl-C"
    add("--checkpoint", type=Path, metavar="PATH", help=f"{when} (default: the path of --resume)")
    more = "resume from this checkpoint; if it has --steps steps already, only evaluate it"
    add("--resume", type=Path, metavar="PATH", help=more)
    add("--plot", type=Path, metavar="PATH", help="draw the result here (.png, .pdf or .svg)")


def check_options(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    options: list[Option],
    from_zero: tuple[str, ...] = (),
) -> None:
    """Check before the training what would fail after it: numbers, files and packages.

    Args:
        from_zero: further arguments that may be zero.
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
    """Check that the plot and the checkpoint can be written, with the packages they need."""
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
    """The given values, otherwise those of the checkpoint, otherwise the defaults."""
    config = {option.name: option.default for option in options}
    config.update(resumed["config"] if resumed else {})
    for name, stored in config.items():
        given = getattr(args, name)
        if resumed and name != "steps" and given not in (None, stored):
            fail(f"{args.resume} was trained with {_flag(name)} {stored}, not {given}")
        config[name] = stored if given is None else given
    return config


def start(
    program: str,
    doc: str | None,
    options: list[Option],
    argv: list[str] | None,
    arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None,
    from_zero: tuple[str, ...] = (),
) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any] | None]:
    """Parse the command line: arguments, values of the options, and the checkpoint to resume.

    Args:
        doc: the docstring of the program; its first line is the description.
        arguments: adds further arguments to the parser.
        from_zero: those of them that may be zero.
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
    """Run the program; Ctrl-C ends it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Replace path atomically, so that it is complete whenever the program stops."""
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
    """The axes of a new plot in the style of the examples; it is saved at the end of the block."""
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
    """A progress bar on a terminal, otherwise ten plain lines. Yields a function of the step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    started = time.perf_counter()

    def plain(step: int) -> None:
        if step % max(1, steps // 10) == 0 or step == steps:
            left = (steps - step) * (time.perf_counter() - started) / (step - done)
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
    """Yields whether Ctrl-C was pressed, as a function. A second Ctrl-C ends the program."""
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
    """Exit after an interrupted training has been saved."""
    how = f"go on with --resume {checkpoint}" if checkpoint else "nothing saved"
    print(f"interrupted after step {where}; {how}", flush=True)
    raise SystemExit(130)


def running_mean(losses: list[float], parts: int) -> tuple[range, Tensor]:
    """Steps, and the running means of the losses: single batches vary too much for a plot."""
    window = max(1, len(losses) // parts)
    return range(window, len(losses) + 1), torch.tensor(losses).unfold(0, window, 1).mean(1)


def clip(model: nn.Module, config: dict[str, Any]) -> float:
    """Clip the gradients by the options, first each element and then their norm.

    Returns:
        The norm of all gradients before clipping.
    """
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    norm = nn.utils.get_total_norm([weight.grad for weight in weights])
    if config["clip_value"]:
        nn.utils.clip_grad_value_(weights, config["clip_value"])
    if config["clip_norm"] and config["clip_value"]:
        nn.utils.clip_grad_norm_(weights, config["clip_norm"])
    elif config["clip_norm"]:
        nn.utils.clip_grads_with_norm_(weights, config["clip_norm"], norm)
    # With sharded parameters each process has only a part of the norm.
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def digest(data: object) -> str:
    """A fingerprint of data, from its printed form."""
    return hashlib.sha256(repr(data).encode()).hexdigest()


class Training:
    """Training of one model with Adam, with checkpoints and the weights of the best validation.

    Args:
        data: the training data; a checkpoint that was trained on other data is refused.
        resumed: the checkpoint to resume, if any.
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
        """Train up to the number of steps of the options, then load the best weights.

        Args:
            validate: computes the validation error, every ``every`` steps.
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
        # Not stored in the checkpoint: a longer training would not validate at this step.
        if [step for step, _ in self.validation[-1:]] != [len(self.losses)]:
            self.validate(validate)
        self.model.load_state_dict(self.best)
        self.model.eval()

    def validate(self, validate: Callable[[], float]) -> None:
        """Record the error of the current weights, and keep the weights if it is the lowest."""
        self.model.eval()
        with torch.no_grad():
            error = validate()
        self.model.train()
        if error < min((e for _, e in self.validation if not math.isnan(e)), default=math.inf):
            self.best = {name: w.clone() for name, w in self.model.state_dict().items()}
        self.validation.append((len(self.losses), error))

    def draw(self, panel: Any, what: str = "loss") -> None:
        """Plot the training losses and the validation errors."""
        panel.plot(*running_mean(self.losses, 50), color=BLUE, label="training")
        panel.plot(*zip(*self.validation, strict=True), color=RED, marker=".", label="validation")
        panel.set(xlabel="training step", ylabel=what)
        panel.grid(alpha=0.3)
