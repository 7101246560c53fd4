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

CHAR_LM = Path(__file__).parent.parent / "examples" / "char_lm.py"
SMALL = ["--hidden", "12", "--embedding", "6", "--batch-size", "4", "--seq-len", "10"]

spec = importlib.util.spec_from_file_location("char_lm", CHAR_LM)
char_lm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(char_lm)


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
    char_lm.save_checkpoint(path, {"step": 1})

    def disk_full(_, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(SystemExit, match=r"cannot save the checkpoint .*No space left"):
        char_lm.save_checkpoint(path, {"step": 2})
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
