"""Reads and writes the part of ABC notation that most tunes of one voice use."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

BAR, REST = "|", "z"
LETTERS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
FIFTHS = "FCGDAEB"
# The number of sharps relative to major on the same tonic.
MODES = {"": 0, "maj": 0, "ion": 0, "mix": -1, "dor": -2, "m": -3, "min": -3, "aeo": -3, "phr": -4}


class Key(NamedTuple):
    """A tonic and a mode, such as D and dor, and their number of sharps (negative: flats)."""

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
    """A note is BAR, or a MIDI pitch (or REST), a colon and its fraction of a whole note."""

    key: Key
    metre: str
    notes: list[str]


def read_key(text: str) -> Key:
    """The key in the notation of the ABC field K. Raises ValueError if it cannot be read."""
    found = re.match(r"\s*([A-G])([#b]?)\s*([a-zA-Z]*)", text)
    mode = found[3].lower()[:3] if found else ""
    if not found or mode not in MODES:
        raise ValueError(f"expected a key such as G, Em or Ddor, got {text.strip()!r}")
    mode = {"maj": "", "ion": "", "min": "m", "aeo": "m"}.get(mode, mode)
    sharps = FIFTHS.index(found[1]) - 1 + 7 * ((found[2] == "#") - (found[2] == "b")) + MODES[mode]
    if abs(sharps) > 7:
        raise ValueError(f"expected a key of seven sharps or flats at most, got {text.strip()!r}")
    return Key(found[1] + found[2], mode, sharps)


# Removed because it is not melody: quoted words, grace notes, ornaments, slurs and the like.
DECORATION = re.compile(r'"[^"]*"|\{[^}]*\}|![^!]*!|%.*|\\$|[~.HLMOPSTuv`)\-]|\((?!\d)|\s', re.M)
PART = re.compile(
    r"(?P<tuplet>\(\d)|(?P<bar>[:|\]]*\|[:|\]]*\[?[12]?|::|\[[12])|(?P<broken>[<>]+)"
    r"|(?P<accidental>[_^=]*)(?P<letter>[A-Ga-gz])(?P<octave>[,']*)(?P<times>\d*)(?P<over>/*\d*)"
)


def read_note(part: re.Match[str], signs: dict[str, int], altered: dict[str, int]) -> str:
    """The pitch of a note. An accidental is stored in ``altered`` until the end of the bar."""
    letter = part["letter"]
    if letter == "z":
        return REST
    if part["accidental"]:
        sharper = {"^": 1, "_": -1, "=": 0}
        altered[letter.upper()] = LETTERS[letter.upper()] + sum(
            sharper[a] for a in part["accidental"]
        )
    octave = letter.islower() + part["octave"].count("'") - part["octave"].count(",")
    return str(60 + altered.get(letter.upper(), signs[letter.upper()]) + 12 * octave)


def read_tune(text: str) -> Tune:
    """One tune in ABC. Raises ValueError for chords, key changes and other unsupported notation."""
    fields = dict(re.findall(r"^([MLK]):([^%\n]*)", text, re.M))
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
    signs, altered = key.letters(), dict[str, int]()
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
            altered.clear()
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
            below = int(over.strip("/") or 2 ** len(over))
            if below == 0:
                raise ValueError(f"expected a part of a note, got {part[0]!r}")
            length = unit * int(part["times"] or 1) / below * longer
            notes.append(
                (read_note(part, signs, altered), length * Fraction(2, 3) if triplet else length)
            )
            triplet, longer = max(0, triplet - 1), Fraction(1)
    while notes and notes[-1][0] == BAR:
        notes.pop()
    return Tune(key, metre, [pitch if pitch == BAR else f"{pitch}:{d}" for pitch, d in notes])


def spell(pitch: int, signs: dict[str, int]) -> tuple[str, str, int]:
    """An accidental, a letter, and its number of semitones above C, ignoring octaves."""
    for letter, value in signs.items():
        if (pitch - value) % 12 == 0:
            return "", letter, value
    shifts = {"=": 0, "^": 1, "_": -1}
    spellings = [(a, x, LETTERS[x] + shift) for a, shift in shifts.items() for x in LETTERS]
    return next(each for each in spellings if (pitch - each[2]) % 12 == 0)


def abc(tune: Tune, title: str) -> str:
    """The tune in ABC notation."""
    signs, bars, altered = tune.key.letters(), [""], set[str]()
    for note in tune.notes:
        if note == BAR:
            bars.append("")
            altered.clear()
            continue
        pitch, _, length = note.partition(":")
        name = pitch
        if pitch != REST:
            accidental, letter, value = spell(int(pitch), signs)
            if accidental or letter in altered:
                # Written at every note whose letter had an accidental in this bar: readers differ
                # in how far one applies (to the end of the bar, in all octaves).
                accidental = accidental or "_=^"[value - LETTERS[letter] + 1]
                altered.add(letter)
            octave = (int(pitch) - 60 - value) // 12
            high = letter.lower() + "'" * (octave - 1)
            name = accidental + (high if octave > 0 else letter + "," * -octave)
        eighths = Fraction(length) * 8
        bars[-1] += name + (f"{eighths}" if eighths != 1 else "")
    lines = [" | ".join(bars[k : k + 4]) for k in range(0, len(bars), 4)]
    head = f"X:1\nT:{title}\nM:{tune.metre}\nL:1/8\nK:{tune.key}\n"
    return head + " |\n".join(lines) + " |]"
