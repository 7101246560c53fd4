#!/usr/bin/env python
"""One to many: a melody from a key, a metre and a first note.

    key and metre -> linear -> the initial state of an LSTM (or GRU, or RNN)
    first note -> LSTM -> linear -> the next note, which is fed back, until the tune ends

It learns from Irish and Scottish tunes in ABC notation: O'Neill's "Music of Ireland" and James
Aird's "Selection of Airs", from the package music21. It prints its melodies in ABC, for any ABC
player.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections import Counter
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from abc_notation import BAR, LETTERS, REST, Key, Tune, abc, read_tune
from sequences import (
    PAD,
    UNKNOWN,
    Vocabulary,
    by_frequency,
    choose,
    cross_entropy,
    padded,
    sizes,
    split,
)
from torch import Tensor, nn
from training import (
    BLUE,
    CELL,
    RED,
    Option,
    Training,
    dropout,
    fail,
    figure,
    learning,
    run_program,
    start,
)

import fastrnn

OPTIONS = [
    CELL,
    Option("hidden", 192, "hidden_size of the layer"),
    Option("embedding", 64, "size of a note embedding"),
    dropout(0.3, "the input and output of the layer"),
    Option("batch_size", 32, "tunes per training step"),
    *learning(1000),
]
BOOKS = ["oneills1850", "airdsAirs"]
LONGEST = 250
"""The most notes and bars in a tune; longer tunes are skipped."""
RARE = 20
"""A tune is skipped if one of its notes occurs less often than this in all tunes."""

END = "end"


def collection() -> list[Tune]:
    """The tunes of the music21 corpus that can be read."""
    package = importlib.util.find_spec("music21")
    if package is None or package.origin is None:
        fail("music21, which has the tunes, is missing: pip install 'fastrnn[examples]'")
    corpus = Path(package.origin).parent / "corpus"
    found: list[Tune] = []
    for book in BOOKS:
        for path in sorted((corpus / book).glob("*.abc")):
            text = path.read_text(encoding="utf-8", errors="replace")
            for part in re.split(r"^(?=X:)", text, flags=re.M)[1:]:
                try:
                    tune = read_tune(part)
                except ValueError:
                    continue
                if 16 <= len(tune.notes) <= LONGEST and tune.notes[0] != BAR:
                    found.append(tune)
    if not found:
        fail(f"no tunes in {corpus}: music21 was installed without its corpus")
    counts = Counter(note for tune in found for note in tune.notes)
    return [tune for tune in found if min(counts[note] for note in tune.notes) >= RARE]


class Composer(nn.Module):
    def __init__(
        self, rnn: type[nn.Module], whole: int, notes: int, config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.states = 2 if rnn is fastrnn.LSTM else 1
        self.first = nn.Linear(whole, self.states * config["hidden"])
        self.embedding = nn.Embedding(notes, config["embedding"], padding_idx=PAD)
        self.rnn = rnn(config["embedding"], config["hidden"])
        self.dropout = nn.Dropout(config["dropout"])
        self.linear = nn.Linear(config["hidden"], notes)

    def begin(self, vector: Tensor) -> Any:
        """The initial state for a vector of key and metre, [B, whole]."""
        parts = torch.tanh(self.first(vector))[None].chunk(self.states, 2)
        parts = tuple(part.contiguous() for part in parts)
        return parts if self.states > 1 else parts[0]

    def forward(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """ids: [T, B] notes. Returns the logits of the next notes, [T, B, notes], and the state."""
        output, state = self.rnn(self.dropout(self.embedding(ids)), state)
        return self.linear(self.dropout(output)), state


class Tunes:
    """Tunes as tensors: a vector of key and metre, and the notes."""

    def __init__(self, train: list[Tune]) -> None:
        self.notes = Vocabulary([*tune.notes, END] for tune in train)
        self.whole = [*sorted({str(t.key) for t in train}), *sorted({t.metre for t in train})]

    def vector(self, key: Key, metre: str) -> Tensor:
        return torch.tensor([float(name in (str(key), metre)) for name in self.whole])

    def encode(self, tune: Tune) -> tuple[Tensor, Tensor]:
        return self.vector(tune.key, tune.metre), self.notes.encode([*tune.notes, END])

    def loss(self, model: Composer, tunes: list[tuple[Tensor, Tensor]]) -> Tensor:
        vectors, notes = zip(*tunes, strict=True)
        ids, _ = padded(notes)
        logits, _ = model(ids[:-1], model.begin(torch.stack(vectors)))
        return cross_entropy(logits, ids[1:])

    @torch.no_grad()
    def compose(
        self, model: Composer, begun: list[Tune], temperature: float, seed: int
    ) -> list[Tune]:
        """A tune for each of the given ones, from its key, metre and first note."""
        generator = torch.Generator().manual_seed(seed)
        state = model.begin(torch.stack([self.vector(t.key, t.metre) for t in begun]))
        drawn = [self.notes.encode([t.notes[0] for t in begun])]
        while len(drawn) < LONGEST:
            logits, state = model(drawn[-1][None], state)
            logits[..., [PAD, UNKNOWN]] = -torch.inf
            p = (logits[0] / temperature).softmax(1)
            drawn.append(torch.multinomial(p, 1, generator=generator).squeeze(1))
        tunes = []
        for tune, row in zip(begun, torch.stack(drawn, 1).tolist(), strict=True):
            notes = self.notes.decode(row)
            ends = notes.index(END) if END in notes else len(notes)
            tunes.append(tune._replace(notes=notes[:ends]))
        return tunes


def in_key(tunes: list[Tune]) -> float:
    """The share of notes in the scale of their tune."""
    fits = [
        int(note.partition(":")[0]) % 12 in tune.key.scale()
        for tune in tunes
        for note in tune.notes
        if note != BAR and not note.startswith(REST)
    ]
    return sum(fits) / max(1, len(fits))


def full_bars(tunes: list[Tune]) -> float:
    """The share of bars whose notes fill the metre, without the first and the last bar."""
    full = []
    for tune in tunes:
        bars = [list(bar) for is_bar, bar in groupby(tune.notes, BAR.__eq__) if not is_bar]
        for bar in bars[1:-1]:
            length = sum(Fraction(note.partition(":")[2]) for note in bar)
            full.append(length == Fraction(tune.metre))
    return sum(full) / max(1, len(full))


def plot(path: Path, title: str, training: Training, tunes: list[Tune]) -> None:
    """The training, and the tunes as a piano roll."""
    with figure(path, title, 1, 2, figsize=(13, 4.2), width_ratios=(1, 1.8)) as (left, right):
        training.draw(left, "cross-entropy of a note, nats")
        for tune, color in zip(tunes, (BLUE, RED), strict=True):
            at, label = Fraction(0), f"{tune.key}, {tune.metre}"
            for note in tune.notes:
                if note == BAR:
                    continue
                pitch, _, length = note.partition(":")
                if pitch != REST:
                    ends = [float(at), float(at + Fraction(length)) - 0.01]
                    right.plot(
                        ends,
                        [int(pitch)] * 2,
                        color=color,
                        lw=4,
                        solid_capstyle="butt",
                        label=label,
                    )
                    label = None
                at += Fraction(length)
        names = [n for n in range(55, 90) if n % 12 in LETTERS.values()]
        right.set_yticks(
            names, ["CDEFGAB"[list(LETTERS.values()).index(n % 12)] for n in names], size=7
        )
        right.set(xlabel="whole notes", ylabel="pitch", xlim=(0, 8))
        right.grid(alpha=0.2)


def main(argv: list[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--key", default="G", help="key of the melody, such as D, Em or Ador (default G)")
        add("--metre", default="6/8", help="metre, such as 4/4 or 6/8 (default 6/8)")
        add("--note", default="d", help="first note, an eighth in ABC notation (default d)")
        add("--temperature", type=float, default=0.7, help="sampling temperature (default 0.7)")

    args, config, resumed = start("melody", __doc__, OPTIONS, argv, arguments)
    try:
        given = read_tune(f"M:{args.metre}\nL:1/8\nK:{args.key}\n{args.note}")
    except ValueError as error:
        fail(str(error))
    if len(given.notes) != 1:
        fail(f"--note: expected one note, got {args.note!r}")
    train, validation, test = split(collection())
    tunes = Tunes(train)
    key, known = given.key, {*tunes.whole, *tunes.notes.symbols}
    for what, got in ((str(key), args.key), (given.metre, args.metre), (given.notes[0], args.note)):
        if what not in known:
            fail(f"no tune that was learnt from has {got}")
    rnn = getattr(fastrnn, config["cell"].upper())
    model = Composer(rnn, len(tunes.whole), len(tunes.notes), config)
    training = Training("melody", model, config, train, resumed)
    encoded = [[tunes.encode(t) for t in part] for part in (train, validation, test)]
    print(
        f"{sizes('tunes', train, validation, test)}, {len(tunes.notes) - 3} notes",
        flush=True,
    )
    training.run(
        lambda: tunes.loss(model, choose(encoded[0], config["batch_size"])),
        lambda: tunes.loss(model, encoded[1]).item(),
        50,
        args.checkpoint,
    )

    notes = [torch.cat([ids[1:] for _, ids in part]) for part in (encoded[0], encoded[2])]
    constant = by_frequency(*notes, len(tunes.notes))
    with torch.no_grad():
        ours = tunes.loss(model, encoded[2]).item()
    print(
        f"\ncross-entropy of a note, test: {ours:.2f} nats, by the notes' frequency {constant:.2f}"
    )
    made = tunes.compose(model, test, args.temperature, config["seed"])
    # The baseline ignores key and metre: the notes of a tune with another key and metre.
    others = []
    for k, tune in enumerate(test):
        unlike = [
            t for t in test[k + 1 :] + test[:k] if t.key != tune.key and t.metre != tune.metre
        ]
        others += [tune._replace(notes=t.notes) for t in unlike[:1]]
    print(f"\n{'':30}{'notes in key':>14}{'full bars':>12}")
    for name, some in (
        ("test tunes", test),
        ("generated, same key and metre", made),
        ("other key and metre", others),
    ):
        print(f"{name:30}{in_key(some):14.1%}{full_bars(some):12.1%}")
    # A second melody from the same note, in the most distant key.
    other = max((tune.key for tune in train), key=lambda k: abs(k.sharps - key.sharps))
    pair = tunes.compose(
        model, [given, given._replace(key=other)], args.temperature, config["seed"]
    )
    print(f"\n{abc(pair[0], f'From {key}, {given.metre} and {args.note}')}")
    title = f"{in_key(made):.0%} of the generated notes are in the given key, "
    title += f"{in_key(others):.0%} of the notes of other tunes"
    print(f"\n{title}.")
    if args.plot:
        plot(args.plot, title, training, pair)


if __name__ == "__main__":
    run_program(main)
