#!/usr/bin/env python
"""One to many: a melody from a key, a metre and a first note.

    key and metre -> linear -> the state that an LSTM (or GRU, or RNN) begins with
    first note -> LSTM -> linear -> the next note, which is read next, and so on to the end

It learns from Irish and Scottish tunes in ABC notation: O'Neill's "Music of Ireland" and James
Aird's "Selection of Airs", as the package music21 has them. What it writes is printed in ABC again,
which any ABC player plays.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections import Counter
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sequences import PAD, UNKNOWN, Vocabulary, choose, padded, split
from torch import Tensor, nn
from training import (
    BLUE,
    CELL,
    CLIP,
    LR,
    RED,
    SEED,
    Option,
    Training,
    fail,
    figure,
    run_program,
    start,
    steps,
)

import fastrnn

OPTIONS = [
    CELL,
    Option("hidden", 192, "its hidden_size"),
    Option("embedding", 64, "the size of a note's embedding"),
    Option("dropout", 0.3, "dropout on its input and output"),
    Option("batch_size", 32, "tunes of a training step"),
    LR,
    SEED,
    steps(1000),
    *CLIP,
]
BOOKS = ["oneills1850", "airdsAirs"]
LONGEST = 250
"""Notes and bars of a tune; longer ones are left out."""
RARE = 20
"""A note that occurs less often in all tunes leaves its tune out."""

BAR, END, REST = "|", "end", "z"
LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
FIFTHS = "FCGDAEB"
# How many sharps more than major on the same tonic.
MODES = {"": 0, "maj": 0, "ion": 0, "mix": -1, "dor": -2, "m": -3, "min": -3, "aeo": -3, "phr": -4}


class Key(NamedTuple):
    """A tonic and a mode, such as D and dor, and with them how many sharps, or flats below zero."""

    tonic: str
    mode: str
    sharps: int

    def __str__(self) -> str:
        return self.tonic + self.mode

    def letters(self) -> dict[str, int]:
        """The pitch class of each letter without an accidental."""
        order = FIFTHS if self.sharps > 0 else FIFTHS[::-1]
        changed = order[: abs(self.sharps)]
        shift = 1 if self.sharps > 0 else -1
        return {letter: n + shift * (letter in changed) for letter, n in LETTERS.items()}

    def scale(self) -> set[int]:
        return {n % 12 for n in self.letters().values()}


class Tune(NamedTuple):
    """notes: BAR, or a pitch as MIDI counts it (or REST), a colon and a part of a whole note."""

    key: Key
    metre: str
    notes: list[str]


def read_key(text: str) -> Key:
    """As ABC writes it after K: or raises ValueError."""
    found = re.match(r"\s*([A-G])([#b]?)\s*([a-zA-Z]*)", text)
    mode = found[3].lower()[:3] if found else ""
    if not found or mode not in MODES:
        raise ValueError(f"expected a key such as G, Em or Ddor, got {text.strip()!r}")
    mode = {"maj": "", "ion": "", "min": "m", "aeo": "m"}.get(mode, mode)
    sharps = FIFTHS.index(found[1]) - 1 + 7 * ((found[2] == "#") - (found[2] == "b")) + MODES[mode]
    if abs(sharps) > 7:
        raise ValueError(f"expected a key of seven sharps or flats at most, got {text.strip()!r}")
    return Key(found[1] + found[2], mode, sharps)


# What is not of the melody: words in quotes, grace notes, ornaments, slurs and the like.
DECORATION = re.compile(r'"[^"]*"|\{[^}]*\}|![^!]*!|%.*|\\$|[~.HLMOPSTuv`)\-]|\((?!\d)|\s', re.M)
PART = re.compile(
    r"(?P<tuplet>\(\d)|(?P<bar>[:|\]]*\|[:|\]]*\[?[12]?|::|\[[12])|(?P<broken>[<>]+)"
    r"|(?P<accidental>[_^=]*)(?P<letter>[A-Ga-gz])(?P<octave>[,']*)(?P<times>\d*)(?P<over>/*\d*)"
)


def read_note(part: re.Match[str], signs: dict[str, int], alone: dict[str, int]) -> str:
    """The pitch of a note, after which an accidental holds in ``signs`` to the bar's end."""
    letter = part["letter"]
    if letter == "z":
        return REST
    if part["accidental"]:
        sharper = {"^": 1, "_": -1, "=": 0}
        alone[letter.upper()] = LETTERS[letter.upper()] + sum(
            sharper[a] for a in part["accidental"]
        )
    octave = letter.islower() + part["octave"].count("'") - part["octave"].count(",")
    return str(60 + alone.get(letter.upper(), signs[letter.upper()]) + 12 * octave)


def read_tune(text: str) -> Tune:
    """One tune in ABC. Raises ValueError where it has what is not read: chords, changing keys."""
    fields = dict(re.findall(r"^([MLK]):(.*)$", text, re.M))
    if (
        "K" not in fields
        or len(re.findall(r"^K:", text, re.M)) > 1
        or re.search(r"^V:", text, re.M)
    ):
        raise ValueError("expected one key and one voice")
    metre = {"C": "4/4", "C|": "2/2"}.get(m := fields.get("M", "4/4").strip(), m)
    unit = Fraction(fields.get("L", "1/8").strip())
    key = read_key(fields["K"])
    body = re.sub(r"^[A-Za-z]:.*$|^%.*$", "", text, flags=re.M)
    body = DECORATION.sub("", body)
    signs, alone = key.letters(), dict[str, int]()
    notes: list[tuple[str, Fraction]] = []
    at, triplet, longer = 0, 0, Fraction(1)
    while at < len(body):
        part = PART.match(body, at)
        if not part:
            raise ValueError(f"cannot read {body[at : at + 10]!r}")
        at = part.end()
        if part["tuplet"]:
            if part["tuplet"] != "(3":
                raise ValueError(f"cannot read {part['tuplet']!r}")
            triplet = 3
        elif part["bar"]:
            alone.clear()
            if notes and notes[-1][0] != BAR:
                notes.append((BAR, Fraction(0)))
        elif part["broken"]:
            if not notes or notes[-1][0] == BAR:
                raise ValueError("expected a note before < or >")
            short = Fraction(1, 2 ** len(part["broken"]))
            before, longer = (2 - short, short) if part["broken"][0] == ">" else (short, 2 - short)
            notes[-1] = notes[-1][0], notes[-1][1] * before
        else:
            over = part["over"]
            below = 2 ** len(over) if over.strip("/") == "" else int(over.strip("/"))
            length = unit * int(part["times"] or 1) / below * longer
            notes.append(
                (read_note(part, signs, alone), length * Fraction(2, 3) if triplet else length)
            )
            triplet, longer = max(0, triplet - 1), Fraction(1)
    while notes and notes[-1][0] == BAR:
        notes.pop()
    return Tune(key, metre, [pitch if pitch == BAR else f"{pitch}:{d}" for pitch, d in notes])


def spell(pitch: int, signs: dict[str, int]) -> tuple[str, str, int]:
    """An accidental, a letter, and how many half-tones above C that is, octaves aside."""
    for letter, value in signs.items():
        if (pitch - value) % 12 == 0:
            return "", letter, value
    shifts = {"=": 0, "^": 1, "_": -1}
    spellings = [(a, x, LETTERS[x] + shift) for a, shift in shifts.items() for x in LETTERS]
    return next(each for each in spellings if (pitch - each[2]) % 12 == 0)


def abc(tune: Tune, title: str) -> str:
    """The tune in ABC notation."""
    signs, bars, alone = tune.key.letters(), [""], dict[str, int]()
    for note in tune.notes:
        if note == BAR:
            bars.append("")
            alone.clear()
            continue
        pitch, _, length = note.partition(":")
        name = pitch
        if pitch != REST:
            accidental, letter, value = spell(int(pitch), signs | alone)
            if accidental:
                alone[letter] = value
            octave = (int(pitch) - 60 - value) // 12
            high = letter.lower() + "'" * (octave - 1)
            name = accidental + (high if octave > 0 else letter + "," * -octave)
        eighths = Fraction(length) * 8
        bars[-1] += name + (f"{eighths}" if eighths != 1 else "")
    lines = [" | ".join(bars[k : k + 4]) for k in range(0, len(bars), 4)]
    head = f"X:1\nT:{title}\nM:{tune.metre}\nL:1/8\nK:{tune.key}\n"
    return head + " |\n".join(lines) + " |]"


def collection() -> list[Tune]:
    """The tunes of music21's corpus that can be read."""
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
                except (ValueError, ZeroDivisionError):
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
        """The state in which the layer knows the vector, [B, whole], that all is made from."""
        parts = torch.tanh(self.first(vector))[None].chunk(self.states, 2)
        parts = tuple(part.contiguous() for part in parts)
        return parts if self.states > 1 else parts[0]

    def forward(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """ids: [T, B] notes. Returns the logits of the next ones, [T, B, notes], and the state."""
        output, state = self.rnn(self.dropout(self.embedding(ids)), state)
        return self.linear(self.dropout(output)), state


class Tunes:
    """Tunes as numbers: the vector of what is known of the whole, and the notes."""

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
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[1:].flatten(), ignore_index=PAD
        )

    @torch.no_grad()
    def compose(
        self, model: Composer, begun: list[Tune], temperature: float, seed: int
    ) -> list[Tune]:
        """A tune for each of those, from its key, its metre and its first note."""
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
    """The share of notes that are of their tune's scale."""
    judged = [
        int(note.partition(":")[0]) % 12 in tune.key.scale()
        for tune in tunes
        for note in tune.notes
        if note != BAR and not note.startswith(REST)
    ]
    return sum(judged) / max(1, len(judged))


def full_bars(tunes: list[Tune]) -> float:
    """The share of bars, but the first and the last, whose notes fill the metre."""
    judged = []
    for tune in tunes:
        bars = [list(bar) for is_bar, bar in groupby(tune.notes, BAR.__eq__) if not is_bar]
        for bar in bars[1:-1]:
            length = sum(Fraction(note.partition(":")[2]) for note in bar)
            judged.append(length == Fraction(tune.metre))
    return sum(judged) / max(1, len(judged))


def plot(path: Path, title: str, training: Training, tunes: list[Tune]) -> None:
    """The training, and the tunes as a roll of paper for a mechanical piano has them."""
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
        add("--key", default="G", help="of the melody, such as D, Em or Ador (default G)")
        add("--metre", default="6/8", help="such as 4/4 or 6/8 (default 6/8)")
        add("--note", default="d", help="the first, an eighth, as ABC writes it (default d)")
        add("--temperature", type=float, default=0.7, help="of the writing (default 0.7)")

    args, config, resumed = start("melody", __doc__, OPTIONS, argv, arguments)
    train, validation, test = split(collection())
    tunes = Tunes(train)
    try:
        given = read_tune(f"M:{args.metre}\nL:1/8\nK:{args.key}\n{args.note}")
    except ValueError as error:
        fail(str(error))
    if len(given.notes) != 1:
        fail(f"--note: expected one note, got {args.note!r}")
    key, known = given.key, {*tunes.whole, *tunes.notes.symbols}
    if missing := {str(key), given.metre, *given.notes} - known:
        fail(f"no tune that was learnt from has {min(missing)}")
    rnn = getattr(fastrnn, config["cell"].upper())
    model = Composer(rnn, len(tunes.whole), len(tunes.notes), config)
    training = Training("melody", model, config, resumed)
    learnt, kept, judged = ([tunes.encode(t) for t in part] for part in (train, validation, test))
    sizes = " + ".join(f"{len(part):,}" for part in (train, validation, test))
    print(
        f"{sizes} tunes for training, validation and test, {len(tunes.notes) - 3} notes", flush=True
    )
    training.run(
        lambda: tunes.loss(model, choose(learnt, config["batch_size"])),
        lambda: tunes.loss(model, kept).item(),
        50,
        args.checkpoint,
    )

    counts = Counter(i for _, ids in learnt for i in ids[1:].tolist())
    share = torch.tensor([counts[i] + 1.0 for i in range(len(tunes.notes))])
    said = torch.cat([ids[1:] for _, ids in judged])
    constant = nn.functional.cross_entropy(share.log().expand(len(said), -1), said).item()
    with torch.no_grad():
        ours = tunes.loss(model, judged).item()
    print(
        f"\ncross-entropy of a note, test: {ours:.2f} nats, by the notes' frequency {constant:.2f}"
    )
    made = tunes.compose(model, test, args.temperature, config["seed"])
    shuffled = [tune._replace(notes=test[k - 1].notes) for k, tune in enumerate(test)]
    print(f"\n{'':28}{'notes in key':>14}{'full bars':>12}")
    for name, some in (
        ("test tunes", test),
        ("written, same key and metre", made),
        ("another test tune", shuffled),
    ):
        print(f"{name:28}{in_key(some):14.1%}{full_bars(some):12.1%}")
    # A second one from the same note, in another key.
    other = read_key("Em" if str(key) != "Em" else "G")
    pair = tunes.compose(
        model, [given, given._replace(key=other)], args.temperature, config["seed"]
    )
    print(f"\n{abc(pair[0], f'From {key}, {given.metre} and {args.note}')}")
    title = f"{in_key(made):.0%} of the notes that it writes are in the key that it was given"
    print(f"\n{title}.")
    if args.plot:
        plot(args.plot, title, training, pair)


if __name__ == "__main__":
    run_program(main)
