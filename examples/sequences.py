"""Sequences of words or other symbols as tensors, shared by the examples on text."""

from __future__ import annotations

import gzip
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from training import fail

DATA = Path(__file__).parent / "data"
PAD, UNKNOWN = 0, 1

Item = TypeVar("Item")


class Vocabulary:
    """Symbols and their numbers: padding, the unknown symbol, then symbols by frequency.

    Args:
        at_least: symbols that occur less often count as unknown.
    """

    def __init__(self, sequences: Iterable[Sequence[str]], at_least: int = 1) -> None:
        counts = Counter(symbol for sequence in sequences for symbol in sequence)
        known = [symbol for symbol, count in counts.items() if count >= at_least]
        self.symbols = ["<pad>", "<unknown>", *sorted(known, key=lambda s: (-counts[s], s))]
        self.index = {symbol: i for i, symbol in enumerate(self.symbols)}

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, sequence: Sequence[str]) -> Tensor:
        return torch.tensor([self.index.get(symbol, UNKNOWN) for symbol in sequence])

    def decode(self, ids: Iterable[int]) -> list[str]:
        return [self.symbols[i] for i in ids]


def padded(sequences: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """The sequences side by side, ``[T, B]`` with zeros after the end, and their lengths."""
    return nn.utils.rnn.pad_sequence(list(sequences)), [len(s) for s in sequences]


def choose(items: Sequence[Item], how_many: int) -> list[Item]:
    """A random batch, drawn by the generator of torch, whose state a checkpoint stores."""
    return [items[i] for i in torch.randint(len(items), (how_many,)).tolist()]


def split(items: Sequence[Item]) -> tuple[list[Item], list[Item], list[Item]]:
    """Eight, one and one tenth for training, validation and test, the same in every run.

    Duplicates are removed, because the test set must not contain training items.
    """
    items = list({repr(item): item for item in items}.values())
    shuffled = random.Random(0).sample(items, len(items))
    first, second = len(items) * 8 // 10, len(items) * 9 // 10
    return shuffled[:first], shuffled[first:second], shuffled[second:]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over the target symbols, ``[T, B]``, without padding."""
    flat = logits.flatten(0, 1), target.flatten()
    return nn.functional.cross_entropy(*flat, ignore_index=PAD)


def sizes(what: str, *parts: Sequence[object]) -> str:
    counts = " + ".join(f"{len(part):,}" for part in parts)
    return f"{counts} {what} for training, validation and test"


def by_frequency(train: Tensor, test: Tensor, symbols: int) -> float:
    """Mean cross-entropy of a constant predictor: the symbol frequencies of the training data."""
    share = torch.bincount(train, minlength=symbols) + 1.0
    logits = share.log().expand(len(test), -1)
    return nn.functional.cross_entropy(logits, test).item()


def numbered(text: str) -> tuple[str, Tensor]:
    """The distinct characters, sorted, and the text as indices into them."""
    characters = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(characters)}
    return characters, torch.tensor([index[character] for character in text])


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file, decompressed if its name ends in .gz."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8").replace("\r\n", "\n")
    except (OSError, EOFError, zlib.error) as error:
        fail(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}")


def read_lines(path: Path) -> list[str]:
    return read_text(path).splitlines()
