"""The example programs: they run, they resume exactly, and they say what is wrong."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the examples need the extra fastrnn[demo]")
pytest.importorskip("matplotlib", reason="the examples need the extra fastrnn[demo]")

EXAMPLES = Path(__file__).parent.parent / "examples"
CHAR_LM = EXAMPLES / "char_lm.py"
SMALL = ["--hidden", "12", "--embedding", "6", "--batch-size", "4", "--seq-len", "10"]

# As if they were run: what they share lies beside them.
sys.path.insert(0, str(EXAMPLES))
import char_lm  # noqa: E402
import forecast  # noqa: E402
import training  # noqa: E402


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


def run(*args):
    char_lm.main([str(arg) for arg in args])


def losses(checkpoint, backend):
    return torch.load(checkpoint, weights_only=True)["runs"][backend]["losses"]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_char_lm_trains_and_compares_both(cell, text, tmp_path):
    plot, checkpoint = tmp_path / "curves.png", tmp_path / "model.pt"
    paths = ["--plot", plot, "--checkpoint", checkpoint]
    command = [sys.executable, CHAR_LM, text, *SMALL, "--cell", cell, "--steps", "60", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("60/60", "bits per character", "perplexity", "times as fast", "writes:"):
        assert expected in done.stdout
    assert "NO " not in done.stdout
    assert "\x1b" not in done.stdout, "escape codes although the output is no terminal"
    assert plot.read_bytes().startswith(b"\x89PNG")
    for backend in "torch", "fastrnn":
        curve = losses(checkpoint, backend)
        assert len(curve) == 60
        assert curve[-1] < curve[0]


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
        (["nowhere.txt"], r"cannot read the text nowhere.txt: No such file"),
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


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
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
    """A forecast does not change with the years after it, nor does what it learns from."""
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


def test_forecast_resumes_exactly(tmp_path):
    options = ["--hidden", "8", "--window", "20", "--clip-value", "0.1"]
    whole, half, rest = (tmp_path / name for name in ("whole.pt", "half.pt", "rest.pt"))
    run_forecast(*options, "--steps", "60", "--checkpoint", whole)
    run_forecast(*options, "--steps", "25", "--checkpoint", half)
    run_forecast("--steps", "60", "--resume", half, "--checkpoint", rest)
    first, second = (torch.load(path, weights_only=True) for path in (whole, rest))
    assert first["losses"] == second["losses"] and len(first["losses"]) == 60
    for name, weight in first["model"].items():
        assert torch.equal(weight, second["model"][name])


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
    training.clip(model, {"clip_value": 2.0, "clip_norm": 0.0})
    assert all((weight.grad == 2).all() for weight in model.parameters())
    training.clip(model, {"clip_value": 0.0, "clip_norm": 1.0})
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
    assert norm.item() == pytest.approx(1.0, rel=1e-4)
