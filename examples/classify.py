#!/usr/bin/env python
"""Many to one: classify film reviews as for or against, or find splice junctions in DNA.

    embedding -> bidirectional LSTM (or GRU, or RNN) -> its two final states -> linear -> the class

A batch contains sequences of different lengths, and the layer gets their ``lengths``. So the final
states are those after the last symbol of each sequence. The baselines are the most frequent class,
and naive Bayes, which counts the symbols and ignores their order.

The reviews are in data/. The DNA is from the R package mlbench and may not be shipped here: in the
middle of sixty bases an intron ends (ie), one begins (ei), or neither.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sequences import DATA, PAD, Vocabulary, choose, padded, read_lines, sizes, split
from torch import Tensor, nn
from training import (
    BLUE,
    CELL,
    GREY,
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
    Option("task", "sentiment", "what to classify", ("sentiment", "dna")),
    CELL,
    Option("hidden", 64, "hidden_size of the layer, in each direction"),
    Option("embedding", 64, "size of a symbol embedding"),
    dropout(0.5, "the input and the final states of the layer"),
    Option("batch_size", 32, "sequences per training step"),
    *learning(1200),
]
JUNCTIONS = [
    top / "R/site-library/mlbench/data/DNA.rda"
    for top in (DATA.parent.parent / "build/usr/lib", Path("/usr/lib"), Path("/usr/local/lib"))
]
"""Where `make junctions`, Debian and R put the file."""

Example = tuple[list[str], int]


class Task(NamedTuple):
    """The names of the classes, and sequences with the index of their class."""

    classes: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def sentiment(path: Path | None) -> Task:
    """Reads lines of a score, a tab and a sentence. The class is the sign of the score."""
    path = path or DATA / "reviews.tsv.gz"
    examples: list[Example] = []
    for number, line in enumerate(read_lines(path), 1):
        score, tab, text = line.partition("\t")
        try:
            value = float(score)
        except ValueError:
            tab = ""
        if not tab:
            fail(
                f"{path}, line {number}: expected a score, a tab and a sentence, got {line[:40]!r}"
            )
        words = re.findall(r"\w+|[!?]", text.replace("n't", " not").lower())
        if words and value:
            examples.append((words, int(value > 0)))
    return Task(["against", "for"], *split(examples))


def dna(path: Path | None) -> Task:
    """Reads an R data frame of three columns per base, then the class."""
    candidates = [path] if path else JUNCTIONS
    file = next((candidate for candidate in candidates if candidate.exists()), None)
    if file is None:
        fail(f"no {candidates[0]}; `make junctions` fetches it on Debian, R's mlbench has it")
    try:
        import pyreadr
    except ImportError as error:
        fail(f"pyreadr, which reads R files, is missing ({error}): pip install 'fastrnn[examples]'")
    base_of_bits = {"100": "A", "010": "C", "001": "G", "000": "T"}
    examples = []
    try:
        frame = pyreadr.read_r(str(file))["DNA"]
        classes = sorted(map(str, set(frame["Class"])))
        for *bits, kind in frame.itertuples(index=False):
            text = "".join(map(str, bits))
            bases = [base_of_bits[text[k : k + 3]] for k in range(0, len(text), 3)]
            examples.append((bases, classes.index(str(kind))))
    except (KeyError, pyreadr.PyreadrError, pyreadr.LibrdataError) as error:
        fail(f"{file}: expected mlbench's data frame DNA, three bits per base: {error}")
    return Task(classes, *split(examples))


TASKS: dict[str, Callable[[Path | None], Task]] = {"sentiment": sentiment, "dna": dna}


class Classifier(nn.Module):
    def __init__(
        self, rnn: type[nn.Module], symbols: int, classes: int, config: dict[str, Any]
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, config["embedding"], padding_idx=PAD)
        self.rnn = rnn(config["embedding"], config["hidden"], bidirectional=True)
        if isinstance(self.rnn, fastrnn.LSTM):  # otherwise it forgets early symbols
            fastrnn.init.forget_bias_(self.rnn, 2.0)
        self.dropout = nn.Dropout(config["dropout"])
        self.linear = nn.Linear(2 * config["hidden"], classes)

    def forward(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """ids: [T, B]. Returns the logits of the classes for each sequence, [B, classes]."""
        _, state = self.rnn(self.dropout(self.embedding(ids)), lengths=lengths)
        h_n = state[0] if isinstance(state, tuple) else state  # [2, B, hidden]
        logits: Tensor = self.linear(self.dropout(torch.cat([h_n[0], h_n[1]], 1)))
        return logits


def naive_bayes(train: list[Example], classes: int) -> Callable[[list[str]], list[float]]:
    """The log-probability of each class, up to a constant, if symbols were independent."""
    counts = [Counter(s for symbols, k in train if k == y for s in symbols) for y in range(classes)]
    sizes = Counter(k for _, k in train)
    known = {symbol for count in counts for symbol in count}
    totals = [sum(count.values()) + len(known) for count in counts]

    def of_classes(symbols: list[str]) -> list[float]:
        scores = []
        for k, (count, total) in enumerate(zip(counts, totals, strict=True)):
            odds = [math.log((count[s] + 1) / total) for s in symbols if s in known]
            scores.append(math.log(sizes[k] / len(train)) + sum(odds))
        return scores

    return of_classes


@torch.no_grad()
def logits(model: Classifier, vocabulary: Vocabulary, sequences: list[list[str]]) -> Tensor:
    batches = [sequences[i : i + 256] for i in range(0, len(sequences), 256)]
    return torch.cat([model(*padded([vocabulary.encode(s) for s in b])) for b in batches])


def accuracy(scores: Tensor, examples: list[Example]) -> float:
    right = scores.argmax(1) == torch.tensor([kind for _, kind in examples])
    return right.float().mean().item()


def as_read(model: Classifier, vocabulary: Vocabulary, symbols: list[str]) -> Tensor:
    """The probabilities of the classes after each symbol: the prefixes are one batch."""
    prefixes = [symbols[: k + 1] for k in range(len(symbols))]
    return logits(model, vocabulary, prefixes).softmax(1)


def plot(
    path: Path,
    title: str,
    training: Training,
    task: Task,
    scores: Tensor,
    read: list[tuple[int, str, Tensor]],
) -> None:
    kinds = torch.tensor([kind for _, kind in task.test])
    p = scores.softmax(1).gather(1, kinds[:, None]).squeeze(1)
    colors = (RED, BLUE, GREY)[: len(task.classes)]
    with figure(path, title, 1, 3, figsize=(15, 4.2)) as (left, middle, right):
        training.draw(left, "cross-entropy, nats")
        shares = [p[kinds == k].tolist() for k in range(len(task.classes))]
        middle.hist(shares, 10, range=(0, 1), label=task.classes, color=colors)
        middle.set(xlabel="probability of the correct class", ylabel="test sequences")
        for k, text, p in read:
            label = f"{task.classes[k]}: {text if len(text) <= 32 else f'{text[:29]}...'}"
            right.plot(range(1, len(p) + 1), p, marker=".", color=colors[k], label=label)
        high = 1.1 + 0.1 * len(read)  # space for the legend
        right.set(xlabel="symbols read", ylabel="probability of that class", ylim=(-0.05, high))


def main(argv: list[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        what = "lines of a score, a tab and a sentence (default data/reviews.tsv.gz), or DNA.rda"
        parser.add_argument("file", nargs="?", type=Path, help=what)

    args, config, resumed = start("classify", __doc__, OPTIONS, argv, arguments)
    task = TASKS[config["task"]](args.file)
    count = len(task.classes)
    if not all(len({kind for _, kind in part}) == count for part in task[1:]):
        fail(f"{args.file}: too few sequences, or none of one of the classes")
    vocabulary = Vocabulary((symbols for symbols, _ in task.train), at_least=2)
    encoded = [(vocabulary.encode(symbols), kind) for symbols, kind in task.train]
    rnn = getattr(fastrnn, config["cell"].upper())
    model = Classifier(rnn, len(vocabulary), count, config)
    training = Training("classify", model, config, task, resumed)

    def loss_of_a_batch() -> Tensor:
        sequences, kinds = zip(*choose(encoded, config["batch_size"]), strict=True)
        return nn.functional.cross_entropy(model(*padded(sequences)), torch.tensor(kinds))

    target = torch.tensor([kind for _, kind in task.validation])

    def validate() -> float:
        scores = logits(model, vocabulary, [symbols for symbols, _ in task.validation])
        return nn.functional.cross_entropy(scores, target).item()

    print(
        f"{config['task']}: {sizes('sequences', *task[1:])}",
        flush=True,
    )
    training.run(loss_of_a_batch, validate, 50, args.checkpoint)

    sequences = [symbols for symbols, _ in task.test]
    scores = logits(model, vocabulary, sequences)
    bayes = torch.tensor(list(map(naive_bayes(task.train, count), sequences)))
    frequency = torch.tensor([[kind for _, kind in task.train].count(k) for k in range(count)])
    rows = {
        f"{rnn.__name__}({config['hidden']}), bidirectional": accuracy(scores, task.test),
        "naive Bayes": accuracy(bayes, task.test),
        f"always: {task.classes[frequency.argmax()]}": accuracy(
            frequency.expand_as(scores), task.test
        ),
    }
    print("\ncorrect test sequences")
    for name, value in rows.items():
        print(f"  {name:26}{value:7.1%}")
    print("\nthe first correct sequence of each class")
    read = []
    guesses = scores.argmax(1).tolist()
    for k, kind in enumerate(task.classes):
        pairs = zip(task.test, guesses, strict=True)
        for symbols in [s for (s, target), guess in pairs if target == guess == k][:1]:
            p = as_read(model, vocabulary, symbols)[:, k]
            text = (" " if config["task"] == "sentiment" else "").join(symbols)
            read.append((k, text, p))
            print(f"\n{text}\n  {kind}: {p[-1]:.0%}")
    ours, other, _ = rows.values()
    title = f"{ours:.0%} of the test sequences are correct, {other:.0%} by naive Bayes"
    print(f"\n{title}.")
    if args.plot:
        plot(args.plot, title, training, task, scores, read)


if __name__ == "__main__":
    run_program(main)
