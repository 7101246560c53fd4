"""Every competitor on every case, in one process: `make bench`.

Machines drift by more than the differences of interest. So a round takes one sample of each
competitor, and the result is the median over the rounds of the ratio of neighbouring samples.
The results of each competitor are first checked against those of torch.nn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from competitors import (
    BUSY_SAMPLE,
    FLOORS,
    MIN_ROUNDS,
    OURS,
    REST,
    SAMPLE,
    TORCH,
    Competitor,
    check,
    prepared,
    repeats,
    rest,
    timed,
)
from workloads import ODD, Case, Problem, cases, flops, problem, weight_bytes

MAX_ROUNDS = 40
BUSY_ROUNDS = 10


def copies(original: Problem, device: str, dtype: torch.dtype) -> list[Problem]:
    """The problem; on a GPU enough copies of it to exceed twice the L2 cache."""
    if device == "cpu":
        return [original]
    first = original.to("cuda", dtype)
    tensors = (first.x, *first.state, first.cotangent, *first.module.parameters())
    size = sum(t.numel() * t.element_size() for t in tensors)
    # AMD GPUs have another cache of 256 MB behind it, which no property reports.
    cache = torch.cuda.get_device_properties(0).L2_cache_size + (256 << 20) * (device == "rocm")
    count = 1 + 2 * cache // size
    return [first, *(original.to("cuda", dtype) for _ in range(min(count, 1000) - 1))]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_speed(
    case: Case,
    benchmark: Any,
    competitors: list[Competitor],
    absent: dict[str, str],
    memory: dict[str, Any],
    peak: Callable[[int], float | None],
    request: pytest.FixtureRequest,
) -> None:
    option = request.config.getoption
    threads = case.threads or option("--threads")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(case.deterministic)
    problems = copies(problem(case), option("--device"), getattr(torch, option("--dtype")))
    expected = [t.detach().clone() for t in TORCH.prepare(case, problems[0], threads)()]
    runs, refusals = {}, {}
    for competitor in competitors:
        if why := absent.get(competitor.name) or competitor.refuses(case):
            refusals[competitor.name] = why
            continue
        try:
            run = prepared(competitor, case, problems, threads)
            check(competitor, competitor.results(run()), expected)
        except Exception as error:
            if competitor in (OURS, TORCH):
                raise
            refusals[competitor.name] = f"failed: {error}"
            continue
        runs[competitor.name] = run
    ours, *others = runs
    floors = [f for f in FLOORS if f.refuses(case) is None]
    runs |= {f.name: prepared(f, case, problems, threads) for f in floors}
    neighbour = replace(case, shape=ODD[case.shape]) if case.shape in ODD else None
    if neighbour:
        beside = copies(problem(neighbour), option("--device"), getattr(torch, option("--dtype")))
        runs["neighbour"] = prepared(OURS, neighbour, beside, threads)

    busy = option("--busy")
    sample = BUSY_SAMPLE if busy else SAMPLE
    once = {name: min(timed(run, 2) for _ in range(3)) for name, run in runs.items()}
    calls = {name: repeats(run, sample) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}

    def sample_others() -> None:
        for name in runs:
            if name != ours:
                rest(runs[name])
                samples[name].append(timed(runs[name], calls[name]))
        rest(runs[ours])

    def sample_ours() -> None:
        samples[ours].append(timed(runs[ours], calls[ours]))

    sample_others(), sample_ours()
    round_takes = sum(REST + once[n] * (calls[n] + 1) for n in runs)
    rounds = round(option("--seconds") / round_takes)
    min_rounds = BUSY_ROUNDS if busy else MIN_ROUNDS
    for values in samples.values():
        values.clear()
    limit = peak(threads)
    rounds = min(MAX_ROUNDS, max(min_rounds, rounds))
    benchmark.pedantic(sample_ours, setup=sample_others, rounds=rounds)
    # pytest-benchmark timed a whole sample; replace it by the time of one call.
    benchmark.stats.stats.data[:] = samples[ours]

    def paired(name: str) -> list[float]:
        return [a / b for a, b in zip(samples[name], samples[ours], strict=True)]

    def extra_seconds(compiled: str, eager: str) -> float:
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
            eager: extra_seconds(name, eager)
            for name in samples
            if (eager := name.removesuffix(" compiled")) != name
        },
        neighbour=neighbour
        and statistics.median(paired("neighbour")) * flops(case) / flops(neighbour),
        refusals=refusals,
        memory=memory.get(str(case)),
    )
