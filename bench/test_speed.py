"""Everybody at every case, by turns in one process: `make bench`.

Machines drift by more than the differences of interest, so a round takes one sample of each
contestant, and what counts is the median over the rounds of the ratio of neighbouring samples.
Everybody's results are compared with torch.nn's first.
"""

from __future__ import annotations

import statistics
from typing import Any

import peers
import pytest
import torch
from cases import Case, cases, flops, problem, recurrent_bytes

ROUNDS = (7, 40)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_speed(
    case: Case,
    benchmark: Any,
    contestants: list[peers.Peer],
    absent: dict[str, str],
    memory: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    threads = case.threads or request.config.getoption("--threads")
    torch.set_num_threads(threads)
    numbers = problem(case)
    expected = peers.Module("torch.nn").prepare(case, numbers, threads)
    expected = [t.detach().clone() for t in expected()]
    runs, refusals = {}, {}
    for peer in contestants:
        if why := absent.get(peer.name) or peer.refuses(case):
            refusals[peer.name] = why
            continue
        try:
            run = peer.prepare(case, numbers, threads)
            peers.check(peer, peer.results(run()), expected)
        except Exception as error:
            if peer in (peers.OURS, peers.PEERS[0]):
                raise
            refusals[peer.name] = f"failed: {error}"
            continue
        runs[peer.name] = run

    once = {name: min(peers.timed(run, 2) for _ in range(3)) for name, run in runs.items()}
    repeats = {name: max(1, round(peers.SAMPLE / seconds)) for name, seconds in once.items()}
    ours, *others = runs
    samples: dict[str, list[float]] = {name: [] for name in runs}

    def turns() -> None:
        for name in others:
            peers.rest(runs[name])
            samples[name].append(peers.timed(runs[name], repeats[name]))
        peers.rest(runs[ours])

    def turn() -> None:
        samples[ours].append(peers.timed(runs[ours], repeats[ours]))

    turns(), turn()
    round_takes = sum(peers.REST + once[n] * (repeats[n] + 1) for n in runs)
    rounds = round(request.config.getoption("--seconds") / round_takes)
    least, most = ROUNDS
    for values in samples.values():
        values.clear()
    benchmark.pedantic(turn, setup=turns, rounds=min(most, max(least, rounds)))
    benchmark.extra_info.update(
        cell=case.cell,
        which=case.which,
        shape=list(case.shape),
        variant=case.variant,
        threads=threads,
        flops=flops(case),
        recurrent_bytes=recurrent_bytes(case),
        seconds={name: statistics.median(values) for name, values in samples.items()},
        ratios={
            name: statistics.median(
                a / b for a, b in zip(samples[name], samples[ours], strict=True)
            )
            for name in others
        },
        refusals=refusals,
        memory=memory.get(str(case)),
    )
