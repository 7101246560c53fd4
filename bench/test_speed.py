"""Everybody at every case, by turns in one process: `make bench`.

Machines drift by more than the differences of interest, so a round takes one sample of each
contestant, and what counts is the median over the rounds of the ratio of neighbouring samples.
Everybody's results are compared with torch.nn's first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peers
import pytest
import torch
from cases import ODD, Case, Problem, cases, flops, problem, weight_bytes

MOST_ROUNDS = 40
BUSY_ROUNDS = 10


def copies(numbers: Problem, device: str, dtype: torch.dtype) -> list[Problem]:
    """The numbers of a case; on a GPU as often as it takes to exceed its L2 cache twice."""
    if device == "cpu":
        return [numbers]
    first = numbers.to("cuda", dtype)
    tensors = (first.x, *first.state, first.cotangent, *first.module.parameters())
    size = sum(t.numel() * t.element_size() for t in tensors)
    # AMD's has another of 256 MB behind it, which no property tells.
    cache = torch.cuda.get_device_properties(0).L2_cache_size + (256 << 20) * (device == "rocm")
    count = 1 + 2 * cache // size
    return [first, *(numbers.to("cuda", dtype) for _ in range(min(count, 1000) - 1))]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_speed(
    case: Case,
    benchmark: Any,
    contestants: list[peers.Peer],
    absent: dict[str, str],
    memory: dict[str, Any],
    peak: Callable[[int], float | None],
    request: pytest.FixtureRequest,
) -> None:
    option = request.config.getoption
    threads = case.threads or option("--threads")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(case.deterministic)
    numbers = copies(problem(case), option("--device"), getattr(torch, option("--dtype")))
    expected = [t.detach().clone() for t in peers.TORCH.prepare(case, numbers[0], threads)()]
    runs, refusals = {}, {}
    for peer in contestants:
        if why := absent.get(peer.name) or peer.refuses(case):
            refusals[peer.name] = why
            continue
        try:
            run = peers.prepared(peer, case, numbers, threads)
            peers.check(peer, peer.results(run()), expected)
        except Exception as error:
            if peer in (peers.OURS, peers.TORCH):
                raise
            refusals[peer.name] = f"failed: {error}"
            continue
        runs[peer.name] = run
    ours, *others = runs
    floors = [f for f in peers.FLOORS if f.refuses(case) is None]
    runs |= {f.name: peers.prepared(f, case, numbers, threads) for f in floors}
    neighbour = replace(case, shape=ODD[case.shape]) if case.shape in ODD else None
    if neighbour:
        beside = copies(problem(neighbour), option("--device"), getattr(torch, option("--dtype")))
        runs["neighbour"] = peers.prepared(peers.OURS, neighbour, beside, threads)

    busy = option("--busy")
    sample = peers.BUSY_SAMPLE if busy else peers.SAMPLE
    once = {name: min(peers.timed(run, 2) for _ in range(3)) for name, run in runs.items()}
    repeats = {name: peers.repeats(run, sample) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}

    def turns() -> None:
        for name in runs:
            if name != ours:
                peers.rest(runs[name])
                samples[name].append(peers.timed(runs[name], repeats[name]))
        peers.rest(runs[ours])

    def turn() -> None:
        samples[ours].append(peers.timed(runs[ours], repeats[ours]))

    turns(), turn()
    round_takes = sum(peers.REST + once[n] * (repeats[n] + 1) for n in runs)
    rounds = round(option("--seconds") / round_takes)
    least, most = BUSY_ROUNDS if busy else peers.FEWEST_ROUNDS, MOST_ROUNDS
    for values in samples.values():
        values.clear()
    limit = peak(threads)
    benchmark.pedantic(turn, setup=turns, rounds=min(most, max(least, rounds)))
    # What pytest-benchmark timed is a whole sample.
    benchmark.stats.stats.data[:] = samples[ours]

    def paired(name: str) -> list[float]:
        return [a / b for a, b in zip(samples[name], samples[ours], strict=True)]

    def more(compiled: str, eager: str) -> float:
        pairs = zip(samples[compiled], samples[eager], strict=True)
        return statistics.median(a - b for a, b in pairs)

    benchmark.extra_info.update(
        cell=case.cell,
        which=case.which,
        shape=list(case.shape),
        variant=case.variant,
        threads=threads,
        flops=flops(case),
        peak=limit,
        weight_bytes=weight_bytes(case),
        rounds=len(samples[ours]),
        seconds={name: statistics.median(values) for name, values in samples.items()},
        ratios={name: statistics.median(paired(name)) for name in others},
        quartiles={name: statistics.quantiles(paired(name))[::2] for name in others},
        compiled={
            eager: more(name, eager)
            for name in samples
            if (eager := name.removesuffix(" compiled")) != name
        },
        neighbour=neighbour
        and statistics.median(paired("neighbour")) * flops(case) / flops(neighbour),
        refusals=refusals,
        memory=memory.get(str(case)),
    )
