"""The example programs: they run, they learn, they resume exactly, and they report errors."""

import importlib.util
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the examples need the extra fastrnn[demo]")
pytest.importorskip("matplotlib", reason="the examples need the extra fastrnn[demo]")

EXAMPLES = Path(__file__).parent.parent / "examples"
CHAR_LM = EXAMPLES / "char_lm.py"
SMALL = ["--hidden", "12", "--embedding", "6", "--batch-size", "4", "--seq-len", "10"]

# As when they are run: the modules that they share are beside them.
sys.path.insert(0, str(EXAMPLES))
import abc_notation  # noqa: E402
import char_lm  # noqa: E402
import classify  # noqa: E402
import forecast  # noqa: E402
import gradients  # noqa: E402
import melody  # noqa: E402
import one_step  # noqa: E402
import sequences  # noqa: E402
import tag  # noqa: E402
import training  # noqa: E402
import translate  # noqa: E402
from processes import Processes  # noqa: E402

music = pytest.mark.skipif(
    importlib.util.find_spec("music21") is None, reason="the tunes need the extra fastrnn[examples]"
)


def cells(quick, others=("rnn", "gru", "lstm")):
    """One cell in every run, since the program is the same for all. The others are heavy."""
    params = [quick, *(pytest.param(c, marks=pytest.mark.heavy) for c in others if c != quick)]
    return pytest.mark.parametrize("cell", params)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The sizes are tiny: a second thread would only wait."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    """135 characters a stream: 13 windows, so that 20 steps go past the end of the text."""
    path = tmp_path / "text.txt"
    path.write_text(char_lm.BOOK.read_text(encoding="utf-8")[:600], encoding="utf-8")
    return path


def version_from(*version):
    return tuple(map(int, torch.__version__.split(".")[:2])) >= version


def run(*args):
    char_lm.main([str(arg) for arg in args])


def losses(checkpoint, backend):
    return torch.load(checkpoint, weights_only=True)["runs"][backend]["losses"]


@cells("lstm")
def test_char_lm_trains_and_compares_both(cell, text, tmp_path):
    plot, checkpoint = tmp_path / "curves.png", tmp_path / "model.pt"
    paths = ["--plot", plot, "--checkpoint", checkpoint]
    command = [sys.executable, CHAR_LM, text, *SMALL, "--cell", cell, "--steps", "60", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("60/60", "bits per character", "perplexity", "times as fast", "writes:"):
        assert expected in done.stdout
    assert "NO " not in done.stdout
    assert "\x1b" not in done.stdout, "escape codes although the output is not a terminal"
    assert plot.read_bytes().startswith(b"\x89PNG")
    for backend in "torch", "fastrnn":
        curve = losses(checkpoint, backend)
        assert len(curve) == 60
        assert curve[-1] < curve[0]


@cells("gru")
def test_char_lm_learns(cell, tmp_path, capsys):
    """More than the frequency of each character."""
    path = tmp_path / "text.txt"
    path.write_text(char_lm.BOOK.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    size = ["--hidden", "48", "--embedding", "16", "--batch-size", "16", "--seq-len", "32"]
    run(path, *size, "--cell", cell, "--steps", "250", "--lr", "0.01", "--backend", "fastrnn")
    out = capsys.readouterr().out
    found = [
        float(line.split()[-2]) for line in out.splitlines() if re.search("perpl|frequency", line)
    ]
    ours, constant = found
    assert ours < 0.75 * constant, out


def test_char_lm_draws_a_bar_on_a_terminal(text, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    run(text, *SMALL, "--steps", "5", "--backend", "torch")
    out = capsys.readouterr().out
    assert "\x1b[" in out
    assert "5/5" in out and "loss" in out and "ms/step" in out


@pytest.mark.parametrize("backend", ["torch", "fastrnn"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_char_lm_resumes_exactly(cell, backend, text, tmp_path):
    options = [text, *SMALL, "--backend", backend, "--write", "0"]
    begin = ["--cell", cell, "--layers", "2", "--dropout", "0.2"]
    whole, half, rest = (tmp_path / name for name in ("whole.pt", "half.pt", "rest.pt"))
    run(*options, *begin, "--steps", "20", "--checkpoint", whole)
    run(*options, *begin, "--steps", "7", "--checkpoint", half)
    run(*options, "--steps", "20", "--resume", half, "--checkpoint", rest)

    assert len(losses(half, backend)) == 7
    assert losses(rest, backend) == losses(whole, backend)
    saved = (torch.load(path, weights_only=True)["runs"][backend] for path in (whole, rest))
    first, second = (state["model"] for state in saved)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_char_lm_goes_on_with_the_other_backend(text, tmp_path):
    begun, continued = tmp_path / "begun.pt", tmp_path / "continued.pt"
    run(text, *SMALL, "--backend", "torch", "--steps", "10", "--checkpoint", begun)
    more = ["--resume", begun, "--checkpoint", continued, "--steps", "30"]
    run(text, "--backend", "fastrnn", *more)
    run(text, "--backend", "torch", "--steps", "30", "--resume", begun, "--checkpoint", begun)
    assert losses(continued, "torch") == losses(begun, "torch")[:10]
    assert losses(continued, "fastrnn") == pytest.approx(losses(begun, "torch"), abs=2e-5)

    before = torch.load(begun, weights_only=True)["runs"]["torch"]["optimizer"]["state"]
    run(text, "--backend", "fastrnn", "--resume", begun, "--checkpoint", begun, "--steps", "40")
    after = torch.load(begun, weights_only=True)["runs"]["torch"]["optimizer"]["state"]
    assert all(torch.equal(before[i]["exp_avg"], after[i]["exp_avg"]) for i in before)


def test_char_lm_sees_a_wrong_gradient(text, monkeypatch, capsys):
    """A gradient that is 1 % too long: Adam hides it from the loss, the norm shows it."""
    import fastrnn

    class Wrong(fastrnn.LSTM):
        def __init__(self, *args):
            super().__init__(*args)
            self.weight_hh_l0.register_hook(lambda grad: 1.01 * grad)

    monkeypatch.setattr(fastrnn, "LSTM", Wrong)
    with pytest.raises(SystemExit, match="the loss curves do not coincide"):
        run(text, *SMALL, "--steps", "40")
    assert "NO " in capsys.readouterr().out


def test_char_lm_saves_on_interrupt(text, tmp_path):
    checkpoint = tmp_path / "model.pt"
    options = [*SMALL, "--steps", "1000000", "--backend", "torch", "--checkpoint", checkpoint]
    process = subprocess.Popen(
        [sys.executable, CHAR_LM, text, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not checkpoint.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert f"--resume {checkpoint}" in out
    assert "Traceback" not in out
    state = torch.load(checkpoint, weights_only=True)["runs"]["torch"]
    assert f"interrupted after step {state['step']} " in out


def test_char_lm_writes_what_is_most_likely_when_cold(text):
    config = {option.name: option.default for option in char_lm.OPTIONS}
    config |= {"hidden": 12, "embedding": 6}
    torch.manual_seed(0)
    trained = char_lm.Run("fastrnn", 9, config, Processes())
    prompt = torch.tensor([3, 1])
    ids, hidden, expected = prompt[:, None], None, []
    trained.model.eval()
    with torch.no_grad():
        for _ in range(30):
            logits, hidden = trained.model(ids, hidden)
            ids = logits[-1:].argmax(2)
            expected.append(int(ids))
    assert trained.write(prompt, 30, 1e-4) == expected
    hot = trained.write(prompt, 30, 1.0)
    assert hot != expected and len(set(hot)) > len(set(expected))


def torchrun(*args):
    """Two processes of char_lm.py."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*start, CHAR_LM, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


# FSDP in torch 2.6 needs CPU events.
needs_fsdp = pytest.mark.skipif(not version_from(2, 7), reason="needs torch 2.7")


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
@pytest.mark.parametrize(
    ("sharded", "resumed_by"),
    [
        pytest.param(True, 1, marks=needs_fsdp),
        pytest.param(False, 1, marks=pytest.mark.heavy),
        pytest.param(False, 2, marks=pytest.mark.heavy),
        pytest.param(True, 2, marks=[needs_fsdp, pytest.mark.heavy]),
    ],
)
def test_char_lm_in_two_processes_is_that_in_one(sharded, resumed_by, text, tmp_path):
    """Each has half of the streams: losses, gradients and weights are those of one with all."""
    alone, shared, rest = (tmp_path / name for name in ("alone.pt", "shared.pt", "rest.pt"))
    options = [text, *SMALL, "--clip-value", "0.05", "--layers", "2", "--write", "10"]
    how = ["--fsdp"] if sharded else []
    done = torchrun(*options, *how, "--steps", "6", "--checkpoint", shared)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in each of 2 processes" in done.stdout and done.stdout.count("6/6") == 2
    assert "times as fast" in done.stdout and "NO " not in done.stdout
    run(*options, "--steps", "6", "--checkpoint", alone)
    one, two = (torch.load(p, weights_only=True)["runs"]["fastrnn"] for p in (alone, shared))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    moments = [each["optimizer"]["state"] for each in (one, two)]
    for name, weight in one["model"].items():
        assert torch.allclose(two["model"][name], weight, atol=1e-4), name
        gradient, other = (each[name]["exp_avg"] for each in moments)  # a mean of the gradients
        assert torch.allclose(other, gradient, atol=1e-6, rtol=1e-3), name

    more = ["--backend", "fastrnn", "--steps", "9", "--resume"]
    run(text, *more, alone, "--checkpoint", alone)
    if resumed_by == 1:
        run(text, *more, shared, "--checkpoint", rest)
    else:
        done = torchrun(text, *how, *more, shared, "--checkpoint", rest)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(rest, "fastrnn") == pytest.approx(losses(alone, "fastrnn"), abs=1e-4)


def test_char_lm_in_processes_reports_errors(text, monkeypatch):
    with pytest.raises(SystemExit, match="--fsdp: start it with torchrun"):
        run(text, *SMALL, "--fsdp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="--batch-size 3 cannot be shared by 2 processes"):
        run(text, *SMALL, "--batch-size", "3")


def test_char_lm_keeps_the_old_checkpoint_if_saving_fails(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    training.save_checkpoint(path, {"step": 1})

    def disk_full(_, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(SystemExit, match=r"cannot save the checkpoint .*No space left"):
        training.save_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.txt"], r"cannot read nowhere.txt: No such file"),
        (["latin1.txt"], r"latin1.txt is not UTF-8 text"),
        (["short.txt"], r"short.txt is too short: it has 30 characters, .* need 69"),
        (["text.txt", "--prompt", "\u2603"], r"--prompt '\u2603' has characters that do not occur"),
        (["text.txt", "--resume", "nowhere.pt"], r"cannot read the checkpoint nowhere.pt: No such"),
        (["text.txt", "--resume", "text.txt"], r"text.txt is not a checkpoint"),
        (["text.txt", "--resume", "empty.pt"], r"empty.pt is not a checkpoint"),
        (["text.txt", "--resume", "cut.pt"], r"cut.pt is not a checkpoint"),
        (["text.txt", "--resume", "foreign.pt"], r"foreign.pt is not a checkpoint of this program"),
        (["text.txt", "--resume", "m.pt", "--cell", "gru"], r"trained with --cell lstm, not gru"),
        (["text.txt", "--resume", "m.pt", "--hidden", "9"], r"trained with --hidden 12, not 9"),
        (["other.txt", "--resume", "m.pt"], r"m.pt was trained on another text than other.txt"),
        (["text.txt", "--checkpoint", "no/m.pt"], r"cannot save no/m.pt: no such folder"),
    ],
)
def test_char_lm_error_messages(options, message, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes(text.read_bytes() + b"\xe9")
    Path("short.txt").write_text("too short to learn from it....", encoding="utf-8")
    Path("other.txt").write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    Path("empty.pt").touch()
    torch.save({"weight": torch.zeros(2)}, "foreign.pt")
    small = [] if "m.pt" in options else SMALL
    if {"m.pt", "cut.pt"} & set(options):
        run(text, *SMALL, "--backend", "torch", "--steps", "2", "--checkpoint", "m.pt")
        Path("cut.pt").write_bytes(Path("m.pt").read_bytes()[:-200])
    with pytest.raises(SystemExit, match=message):
        run(*options, *small, "--backend", "torch", "--steps", "2")


@pytest.mark.parametrize(
    ("option", "value"),
    [("hidden", "0"), ("steps", "-1"), ("lr", "nan"), ("dropout", "1"), ("plot", "curves")],
)
def test_char_lm_rejects_values_that_make_no_sense(option, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--backend", "torch", f"--{option}", value)
    assert stopped.value.code == 2
    assert f"--{option}" in capsys.readouterr().err


def test_char_lm_says_which_extra_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else found(name)
    )
    with pytest.raises(SystemExit, match=r"rich is missing: pip install 'fastrnn\[demo\]'"):
        run("--backend", "torch")


@cells("rnn")
def test_forecast_beats_the_naive_forecast(cell, tmp_path, capsys):
    plot = tmp_path / "forecast.png"
    run_forecast("--cell", cell, "--hidden", "16", "--steps", "200", "--plot", plot)
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("  ")]
    model, this_year, _ = (float(row[-forecast.CYCLE]) for row in rows)
    assert model < 0.75 * this_year, out
    assert "200/200" in out and plot.read_bytes().startswith(b"\x89PNG")


def run_forecast(*args):
    forecast.main([str(arg) for arg in args])


def test_forecast_knows_only_the_past():
    """A forecast does not depend on the years after it, nor do its training data."""
    series = forecast.Series(forecast.SERIES)
    model = forecast.Forecaster(torch.nn.GRU, 5)
    before = forecast.forecasts(model, series, 4)
    numbers = series.network()[: series.train].clone()
    series.values[series.validation :] += 100
    after = forecast.forecasts(model, series, 4)
    assert torch.equal(before[: series.validation], after[: series.validation])
    assert not torch.equal(before, after)
    assert torch.equal(numbers, series.network()[: series.train])


def test_forecast_errors_are_those_of_a_loop():
    series = forecast.Series(forecast.SERIES)
    predicted = forecast.naive(series, 3)
    for ahead, error in enumerate(forecast.errors(predicted, series, 250, 309), 1):
        pairs = zip(series.values[250 - ahead : -ahead], series.values[250:], strict=True)
        squares = [(a - b).item() ** 2 for a, b in pairs]
        assert error == pytest.approx((sum(squares) / len(squares)) ** 0.5)


def same_checkpoints(first, second):
    assert first["losses"] == second["losses"] and first["validation"] == second["validation"]
    for weights in "model", "best":
        for name, weight in first[weights].items():
            assert torch.equal(weight, second[weights][name]), (weights, name)


def test_forecast_resumes_exactly(tmp_path):
    options = ["--hidden", "8", "--window", "20", "--clip-value", "0.1"]
    whole, half, rest = (tmp_path / name for name in ("whole.pt", "half.pt", "rest.pt"))
    run_forecast(*options, "--steps", "60", "--checkpoint", whole)
    run_forecast(*options, "--steps", "25", "--checkpoint", half)
    run_forecast("--steps", "60", "--resume", half, "--checkpoint", rest)
    first, second = (torch.load(path, weights_only=True) for path in (whole, rest))
    assert len(first["losses"]) == 60
    same_checkpoints(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.csv"], r"nowhere.csv: expected a line of names"),
        (["words.csv"], r"words.csv: expected a line of names.*could not convert"),
        (["short.csv"], r"short.csv has 7 values to learn from, not more than a --window of 48"),
    ],
)
def test_forecast_error_messages(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.csv").write_text("year,value\n1900,many\n", encoding="utf-8")
    Path("short.csv").write_text("year,value\n" + "1900,1\n" * 10, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        run_forecast(*options, "--steps", "2")


def test_gradients_are_clipped():
    model = torch.nn.Linear(3, 3)
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 10.0)
    norm = training.clip(model, {"clip_value": 2.0, "clip_norm": 0.0})
    assert all((weight.grad == 2).all() for weight in model.parameters())
    assert norm == pytest.approx(10 * 12**0.5)
    training.clip(model, {"clip_value": 0.0, "clip_norm": 1.0})
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("limit", ["--clip-norm", "--clip-value"])
@pytest.mark.parametrize("program", [char_lm, forecast])
def test_programs_clip(program, limit, text, tmp_path):
    """Gradients far below Adam's epsilon leave the weights where they are."""
    small = [str(text), *SMALL, "--backend", "fastrnn"] if program is char_lm else ["--hidden", "8"]
    moved = []
    for value in "1e-12", "0":
        weights = []
        for steps in "1", "6":
            path = tmp_path / f"{steps}.pt"
            program.main([*small, limit, value, "--steps", steps, "--checkpoint", str(path)])
            state = torch.load(path, weights_only=True)
            weights.append((state["runs"]["fastrnn"] if "runs" in state else state)["model"])
        first, last = weights
        moved.append(max((first[name] - last[name]).abs().max().item() for name in first))
    assert moved[0] < 1e-4 < 1e-3 < moved[1]


def test_a_training_is_stopped_and_goes_on(tmp_path, capsys):
    config = {"lr": 0.01, "steps": 9, "clip_norm": 0.0, "clip_value": 0.0}
    path = tmp_path / "m.pt"

    def begin(resumed=None, stop_at=None):
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 1)
        begun = training.Training("any", model, config, "data", resumed)

        def loss():
            if len(begun.losses) + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return model(torch.randn(5, 3)).square().mean()

        begun.run(loss, lambda: model.weight.square().sum().item(), 2, path)
        return begun

    with pytest.raises(SystemExit) as stopped:
        begin(stop_at=3)
    assert stopped.value.code == 130
    assert f"interrupted after step 3; go on with --resume {path}" in capsys.readouterr().out
    saved = torch.load(path, weights_only=True)
    assert len(saved["losses"]) == 3
    rest, whole = begin(saved), begin()
    assert len(whole.losses) == 9
    same_checkpoints(rest.state(), whole.state())


SMALLER = {
    classify: ["--hidden", "8", "--embedding", "8"],
    tag: ["--hidden", "8", "--embedding", "8"],
    translate: ["--hidden", "8", "--embedding", "8", "--beam", "2"],
    one_step: ["--hidden", "8"],
    melody: ["--hidden", "8", "--embedding", "8"],
}
PROGRAMS = [pytest.param(p, marks=[music] if p is melody else []) for p in SMALLER]


@pytest.fixture
def few(monkeypatch):
    """A part of each data set, for programs that only have to run."""
    for module, name in ((classify, "read_lines"), (tag, "read_lines"), (translate, "read_lines")):
        monkeypatch.setattr(module, name, lambda path: sequences.read_lines(path)[:600])
    monkeypatch.setattr(melody, "BOOKS", ["airdsAirs"])


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_resume_exactly(program, few, tmp_path, monkeypatch):
    whole_run = training.Training.run
    every_four = lambda self, loss, validate, _, path: whole_run(self, loss, validate, 4, path)  # noqa: E731
    monkeypatch.setattr(training.Training, "run", every_four)
    name, options = program.__name__, SMALLER[program]
    whole, half, rest, plot = (tmp_path / n for n in ("whole.pt", "half.pt", "rest.pt", "p.png"))
    program.main([*options, "--steps", "12", "--checkpoint", str(whole), "--plot", str(plot)])
    program.main([*options, "--steps", "5", "--checkpoint", str(half)])
    program.main(["--steps", "12", "--resume", str(half), "--checkpoint", str(rest)])
    first, second = (torch.load(path, weights_only=True) for path in (whole, rest))
    assert first["program"] == name and len(first["losses"]) == 12
    assert [step for step, _ in first["validation"]] == [4, 8, 12]
    same_checkpoints(first, second)
    assert plot.read_bytes().startswith(b"\x89PNG")


def rows(out):
    """A printed table of three rows: the share at the end of each, by the name before it."""
    found = {}
    for line in out.splitlines():
        *name, value = line.split() or [""]
        if line.startswith("  ") and value.endswith("%"):
            found[" ".join(name)] = float(value[:-1]) / 100
    return dict(list(found.items())[:3])


@cells("lstm")
def test_classify_learns_sentiment(cell, capsys):
    size = ["--hidden", "16", "--embedding", "16", "--dropout", "0.2", "--lr", "0.005"]
    classify.main(["--cell", cell, "--steps", "400", *size])
    ours, _, always = rows(capsys.readouterr().out).values()
    assert ours > always + 0.1


junctions = pytest.mark.skipif(
    not any(path.exists() for path in classify.JUNCTIONS), reason="`make junctions` fetches them"
)


@junctions
def test_classify_reads_the_junctions_of_mlbench():
    pytest.importorskip("pyreadr", reason="R's files need the extra fastrnn[examples]")
    task = classify.dna(None)
    examples = [example for part in task[1:] for example in part]
    assert task.classes == ["ei", "ie", "n"] and {kind for _, kind in examples} == {0, 1, 2}
    assert len(examples) > 3000 and {len(symbols) for symbols, _ in examples} == {60}


@pytest.mark.heavy
@junctions
# A plain RNN does not learn these in this number of steps.
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_classify_learns_dna(cell, capsys):
    pytest.importorskip("pyreadr", reason="R's files need the extra fastrnn[examples]")
    size = ["--hidden", "24", "--embedding", "8", "--dropout", "0.1", "--lr", "0.01"]
    classify.main(["--task", "dna", "--cell", cell, "--steps", "800", *size])
    ours, bayes, always = rows(capsys.readouterr().out).values()
    assert ours > max(bayes, always) + 0.1


def write_dna(path, texts, classes, name="DNA"):
    """A data frame of three bits to a base, as mlbench has it."""
    pyreadr = pytest.importorskip("pyreadr", reason="R's files need the extra fastrnn[examples]")
    import pandas

    bits = {"A": "100", "C": "010", "G": "001", "T": "000"}
    frame = pandas.DataFrame([list("".join(bits[base] for base in text)) for text in texts])
    frame.columns = [f"V{k}" for k in range(3 * len(texts[0]))]
    frame["Class"] = classes
    pyreadr.write_rdata(str(path), frame, df_name=name)


@cells("gru")
def test_classify_learns_dna_whose_order_decides(cell, tmp_path, capsys):
    """Which of three motifs of the same bases is in the middle."""
    draw, path = random.Random(0), tmp_path / "DNA.rda"
    motifs = {"ei": "GGTA", "ie": "TAGG", "n": "GTGA"}
    classes = [draw.choice(list(motifs)) for _ in range(900)]
    ends = ["".join(draw.choices("ACGT", k=12)) for _ in classes]
    texts = [end[:6] + motifs[kind] + end[6:] for end, kind in zip(ends, classes, strict=True)]
    write_dna(path, texts, classes)
    size = ["--hidden", "16", "--embedding", "8", "--dropout", "0", "--lr", "0.01"]
    classify.main([str(path), "--task", "dna", "--cell", cell, "--steps", "300", *size])
    ours, bayes, always = rows(capsys.readouterr().out).values()
    assert ours > max(bayes, always) + 0.3


def test_classify_reads_a_data_frame_of_r(tmp_path):
    path = tmp_path / "DNA.rda"
    texts, classes = ["ACGT", "TTAA", "GGCA"] * 10, ["ei", "ie", "n"] * 10
    write_dna(path, texts, classes)
    task = classify.dna(path)
    assert task.classes == ["ei", "ie", "n"]
    found = {("".join(symbols), kind) for part in task[1:] for symbols, kind in part}
    assert found == {("ACGT", 0), ("TTAA", 1), ("GGCA", 2)}
    assert sum(map(len, task[1:])) == 3, "duplicates are used once"
    write_dna(path, texts, classes, "Other")
    with pytest.raises(SystemExit, match="expected mlbench's data frame DNA"):
        classify.dna(path)


def test_naive_bayes_is_that_of_its_definition():
    train = [(["a", "b"], 1), (["a"], 1), (["b", "b"], 0)]
    no, yes = classify.naive_bayes(train, 2)(["a", "b", "unseen"])
    # After 1 each: P(a | yes) = 3/5, P(b | yes) = 2/5; P(a | no) = 1/4, P(b | no) = 3/4.
    assert yes == pytest.approx(math.log((2 / 3) * (3 / 5) * (2 / 5)))
    assert no == pytest.approx(math.log((1 / 3) * (1 / 4) * (3 / 4)))


def test_classify_reads_each_prefix_as_if_alone():
    config = {"embedding": 5, "hidden": 5, "dropout": 0.0}
    model = classify.Classifier(layer("GRU"), 6, 2, config).eval()
    symbols = ["a", "b", "c"]
    vocabulary = sequences.Vocabulary([symbols])
    read = classify.as_read(model, vocabulary, symbols)
    for k in range(3):
        alone = model(vocabulary.encode(symbols[: k + 1])[:, None], [k + 1])
        assert torch.allclose(read[k], alone.softmax(1)[0], atol=1e-6)


def layer(name):
    import fastrnn

    return getattr(fastrnn, name)


@cells("rnn")
def test_tag_learns(cell, capsys):
    tag.main(
        ["--cell", cell, "--hidden", "24", "--embedding", "24", "--steps", "300", "--lr", "0.01"]
    )
    ours, by_word, always = rows(capsys.readouterr().out).values()
    assert ours > 0.75 > always + 0.4 and by_word > 0.8


def test_tag_does_not_see_what_is_padded():
    """Each utterance of a batch gets the tags that it gets alone."""
    batches = tag.Batches(utterances := tag.corpus()[:40])
    model = tag.Tagger(
        layer("LSTM"),
        len(batches.words),
        len(batches.tags),
        {"embedding": 5, "hidden": 6, "dropout": 0.0},
    )
    words = [[word for word, _ in u] for u in utterances]
    together = batches.tag(model.eval(), words)
    assert together == [batches.tag(model, [each])[0] for each in words]
    losses = torch.stack([batches.loss(model, [batches.encode(u)]) * len(u) for u in utterances])
    mean = losses.sum() / sum(map(len, utterances))
    assert torch.allclose(batches.loss(model, [batches.encode(u) for u in utterances]), mean)


@cells("lstm")
def test_translate_learns(cell, tmp_path, capsys):
    path = tmp_path / "m.pt"
    size = ["--hidden", "64", "--embedding", "32", "--dropout", "0.1", "--lr", "0.005"]
    translate.main(["--cell", cell, *size, "--steps", "250", "--checkpoint", str(path)])
    out = capsys.readouterr().out
    ours, constant = map(
        float, re.findall(r"test: (\S+) nats, by the words' frequency (\S+)", out)[0]
    )
    assert ours < constant - 1, out
    greedy, beam = (
        float(line.split()[-1]) for line in out.splitlines() if re.match("greedy|beam", line)
    )
    assert beam > greedy, "the beam finds what is more probable"


class Known(torch.nn.Module):
    """A model of translations with a table of probabilities, of one word after another."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def encode(self, ids, lengths):
        memory = translate.Memory(torch.zeros(ids.shape[1], 1, 1), torch.ones(ids.shape[1], 1) > 0)
        return memory, (torch.zeros(1, ids.shape[1], 1),)

    def decode(self, ids, memory, state):
        return self.table[ids].log(), state, None


def test_a_beam_finds_what_is_most_probable():
    """Greedy search takes the likelier first word, after which every text is improbable."""
    begin, end, a, b, c = range(2, 7)
    table = torch.full((7, 7), 1e-9)
    table[begin, [a, b]] = torch.tensor([0.6, 0.4])
    table[a, [a, b, c, end]] = torch.tensor([0.3, 0.2, 0.3, 0.2])
    table[b, [c, end]] = torch.tensor([0.9, 0.1])
    table[c, end] = 1.0
    source = [torch.tensor([1, 1])]
    (greedy, low), (wide, high) = (
        translate.search(Known(table), source, begin, end, w)[0] for w in (1, 5)
    )
    assert wide == [b, c] and high == pytest.approx(math.log(0.4 * 0.9))
    assert greedy[0] == a and low < high


def test_a_beam_translates_each_text_as_if_alone():
    torch.manual_seed(0)
    config = {"embedding": 6, "hidden": 8, "dropout": 0.0}
    model = translate.Translator(layer("LSTM"), 9, 9, config).eval()
    sources = [torch.randint(2, 9, (n,)) for n in (1, 4, 3)]
    for width in (1, 3):
        together = translate.search(model, sources, 2, 3, width)
        for source, (text, score) in zip(sources, together, strict=True):
            ((alone, lonely),) = translate.search(model, [source], 2, 3, width)
            assert text == alone and score == pytest.approx(lonely, abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("kitten", "sitting", 3)],
)
def test_distance(a, b, expected):
    assert translate.distance(list(a), list(b)) == translate.distance(list(b), list(a)) == expected


TUNE = """X:1
T:All that is read
M:6/8 % with a remark
L:1/8
K:D
|:d2e f>g ^c|{g}c=c c (3ABc|F3- "Am"F2 z:|
[1 A, B,/ b' d/2 ||"""


def test_melody_reads_abc():
    tune = abc_notation.read_tune(TUNE)
    assert (str(tune.key), tune.metre) == ("D", "6/8") and tune.key.sharps == 2
    assert tune.notes == [
        "74:1/4", "76:1/8", "78:3/16", "79:1/16", "73:1/8", "|",
        "73:1/8", "72:1/8", "72:1/8", "69:1/12", "71:1/12", "72:1/12", "|",
        "66:3/8", "66:1/4", "z:1/8", "|",
        "57:1/8", "59:1/16", "95:1/8", "74:1/16",
    ]  # fmt: skip


@pytest.mark.parametrize("key", ["D", "Ebm", "F#m", "Ador", "Gmix", "Cb"])
def test_melody_writes_what_it_reads(key):
    pitches = [
        abc_notation.BAR if n % 9 == 8 else f"{n}:{Fraction(1 + n % 4, 16)}" for n in range(43, 97)
    ]
    tune = abc_notation.Tune(
        abc_notation.read_key(key), "4/4", [abc_notation.REST + ":1/8", *pitches]
    )
    assert abc_notation.read_tune(abc_notation.abc(tune, "Any")) == tune


def test_a_scale_has_the_tones_of_its_mode():
    assert (
        abc_notation.read_key("Ddor").scale()
        == abc_notation.read_key("C").scale()
        == {0, 2, 4, 5, 7, 9, 11}
    )
    assert abc_notation.read_key("Em").scale() == abc_notation.read_key("Gmaj").scale()
    assert abc_notation.read_key("Bb").scale() == {10, 0, 2, 3, 5, 7, 9}
    with pytest.raises(ValueError, match="a key such as"):
        abc_notation.read_key("H")


@music
def test_melody_writes_what_others_read():
    """Naturals after accidentals, in all octaves and bars, by music21."""
    from music21 import converter

    pitches = [60, 61, 60, 73, 72, 71, 70, 71, "|", 61, 72, 66, 65, 77, 63, 64, "|", 70, 60]
    notes = [each if each == "|" else f"{each}:1/8" for each in pitches]
    for key in "C", "D", "Eb", "Ador":
        tune = abc_notation.Tune(abc_notation.read_key(key), "4/4", notes)
        read = converter.parse(abc_notation.abc(tune, "Any"), format="abc").recurse().notes
        assert [note.pitch.midi for note in read] == [n for n in pitches if n != "|"], key


@music
def test_melody_composes_from_key_and_first_note(few):
    torch.manual_seed(0)
    tunes = melody.Tunes(some := melody.collection())
    config = {"hidden": 16, "embedding": 8, "dropout": 0.0}
    model = melody.Composer(layer("LSTM"), len(tunes.whole), len(tunes.notes), config).eval()
    model.first.weight.data *= 10  # the given key and metre decide, though nothing was learnt
    begun = some[:6]
    made = tunes.compose(model, begun, 1.0, 0)
    for given, tune in zip(begun, made, strict=True):
        assert tune.notes[0] == given.notes[0] and (tune.key, tune.metre) == given[:2]
    same = tunes.compose(model, [some[0], some[0]._replace(metre="unheard")], 1e-7, 0)
    assert same[0].notes != same[1].notes, "the metre takes no part"
    keys = [some[0]._replace(key=key) for key in sorted({tune.key for tune in some})[:2]]
    first, second = tunes.compose(model, keys, 1e-7, 0)
    assert first.notes != second.notes, "the key takes no part"
    cold = [tunes.compose(model, begun, 1e-7, seed) for seed in (1, 2)]
    assert cold[0] == cold[1] and cold[0] != made


@music
@cells("gru")
def test_melody_learns(cell, capsys):
    size = ["--hidden", "48", "--embedding", "24", "--dropout", "0.1", "--lr", "0.01"]
    melody.main(["--cell", cell, *size, "--steps", "150", "--batch-size", "16"])
    out = capsys.readouterr().out
    ours, constant = map(
        float, re.findall(r"test: (\S+) nats, by the notes' frequency (\S+)", out)[0]
    )
    assert ours < constant - 0.5, out
    assert "X:1" in out


def test_melody_says_which_extra_is_missing(monkeypatch):
    monkeypatch.setattr(
        melody.importlib.util, "find_spec", lambda name: None if name == "music21" else name
    )
    with pytest.raises(
        SystemExit, match=r"music21, .* is missing: pip install 'fastrnn\[examples\]'"
    ):
        melody.main(["--steps", "1"])


@cells("lstm")
def test_one_step_is_a_plain_network(cell, capsys):
    one_step.main(["--cell", cell, "--hidden", "16", "--steps", "300"])
    out = capsys.readouterr().out
    apart, gradients, recurrent = map(float, re.findall(r"^ +(\d\.\de\S+)  ", out, re.M))
    assert apart < 1e-12 and gradients < 1e-12 and recurrent == 0
    ours, naive = map(float, re.findall(r"error is (\S+), of the naive forecast (\S+)\.", out)[-1])
    assert ours < 0.85 * naive


def test_gradients_vanish_explode_and_are_carried(tmp_path, capsys):
    plot = tmp_path / "flow.png"
    options = ["--length", "120", "--steps", "600"]
    gradients.main([*options, "--plot", str(plot), "--flow", str(tmp_path / "library.png")])
    out = capsys.readouterr().out
    reached = dict(re.findall(r"^    (\S.*?) +(\d\.\de\S+)$", out, re.M))
    value = {name: float(number) for name, number in reached.items()}
    assert (
        value["W_hh = 0.9 I"] < 1e-4 < 1e-2 < value["W_hh = 1.0 I"] < 1.5
        and value["W_hh = 1.1 I"] > 1e2
    )
    assert max(value[name] for name in ("RNN", "GRU", "LSTM, h", "LSTM, c")) < 1e-6
    assert value["as torch.nn does"] < 1e-6 < 1e-2 < value["with forget_bias_(layer, 4)"]
    assert value["with chrono_"] > 1e-2
    open_gates = dict(re.findall(r"^    (\S.*?) +(\S+)%$", out, re.M))
    assert float(open_gates["as torch.nn does"]) < 1 < 70 < float(open_gates["with chrono_"])
    table = re.findall(
        r"^  (\w+ clipped(?: at \S+)?|by the .*frequency) +(?:\S+ +)?(\S+)$", out, re.M
    )
    last = {name: float(number) for name, number in table}
    assert math.isnan(last["not clipped"])
    constant = last["by the characters' frequency"]
    assert max(last["norm clipped at 1"], last["values clipped at 0.1"]) < constant - 0.05, out
    for path in plot, tmp_path / "library.png":
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (classify, ["nowhere.tsv"], r"cannot read nowhere.tsv: No such file"),
        (classify, ["words.tsv"], r"words.tsv, line 1: expected a score, a tab and a sentence"),
        (classify, ["few.tsv"], r"few.tsv: too few sequences"),
        (classify, ["--task", "dna", "nowhere"], r"no nowhere; `make junctions` fetches it"),
        (
            classify,
            ["--task", "dna", "words.tsv"],
            r"words.tsv: expected mlbench's data frame|missing",
        ),
        (translate, ["few.tsv", "--hidden", "7"], r"--hidden 7: expected an even number"),
        (translate, ["few.tsv"], r"few.tsv: expected ten pairs or more of up to 12 words"),
        (
            translate,
            ["words.tsv"],
            r"words.tsv, line 1: expected a text, a tab and its translation",
        ),
        (translate, ["cut.gz"], r"cannot read cut.gz"),
        (tag, ["--resume", "other.pt"], r"other.pt is not a checkpoint of this program"),
        pytest.param(
            melody, ["--key", "H"], r"expected a key such as G, Em or Ddor, got 'H'", marks=music
        ),
        pytest.param(melody, ["--note", "x"], r"cannot read 'x'", marks=music),
        pytest.param(
            melody, ["--metre", "7/8"], r"no tune that was learnt from has 7/8", marks=music
        ),
    ],
)
def test_error_messages_of_programs(program, options, message, few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("words.tsv").write_text("no score here\n", encoding="utf-8")
    Path("few.tsv").write_text("1.0\tgood\n-1.0\tbad\n", encoding="utf-8")
    Path("cut.gz").write_bytes(translate.PAIRS.read_bytes()[:1000])
    torch.save({"program": "forecast"}, "other.pt")
    with pytest.raises(SystemExit, match=message):
        program.main([*options, "--steps", "1"])


@pytest.mark.parametrize("longer", [False, True])
def test_a_checkpoint_of_other_data(longer, few, tmp_path):
    """Also where the sizes of the other data are the same."""
    path, other = tmp_path / "m.pt", tmp_path / "other"
    if longer:
        program, options = classify, ["--hidden", "8", "--embedding", "8"]
        lines = [f"1.0\tgood film {k}\n-1.0\tbad film {k}\n" for k in range(30)]
        other.write_text("".join(lines), encoding="utf-8")
    else:
        program, options = forecast, ["--hidden", "8"]
        text = forecast.SERIES.read_text(encoding="utf-8").replace("1700,", "1700,1")
        other.write_text(text, encoding="utf-8")
    program.main([*options, "--steps", "2", "--checkpoint", str(path)])
    with pytest.raises(SystemExit, match=r"m\.pt was trained on other data"):
        program.main([str(other), "--resume", str(path)])


def test_the_page_of_examples_has_the_commands_of_the_gallery():
    root = EXAMPLES.parent

    def commands(text, start, folder=""):
        joined = text.replace("\\\n", " ").replace(folder, "")
        lines = (" ".join(line.split()) for line in joined.splitlines())
        return {line.removeprefix(start) for line in lines if line.startswith(start + "examples/")}

    page = (root / "docs/examples/README.md").read_text(encoding="utf-8")
    recipe = (root / "Makefile").read_text(encoding="utf-8").partition("\ngallery:")[2]
    recipe = recipe.partition("\n\n")[0]
    made = commands(recipe, "$(bin)/python ", "docs/examples/")
    assert made and commands(page, "python ") == made
    for name in re.findall(r"\]\((\w+\.png)\)", page):
        assert (root / "docs/examples" / name).exists(), name
    drawn = {word for command in made for word in command.split() if word.endswith(".png")}
    assert drawn == set(re.findall(r"\]\((\w+\.png)\)", page))
