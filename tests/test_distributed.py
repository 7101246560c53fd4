"""Two processes that share a batch get the gradients of one process with the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastrnn

rank, how, store = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        options = {"num_layers": 2, "bidirectional": True}
        self.rnn = fastrnn.RNN(3, 6, **options)
        self.lstm = fastrnn.LSTM(12, 6, **options)
        self.gru = fastrnn.GRU(12, 6, **options)
        self.rnn_cell = fastrnn.RNNCell(12, 6)
        self.lstm_cell = fastrnn.LSTMCell(6, 6)
        self.gru_cell = fastrnn.GRUCell(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        for layer in self.rnn, self.lstm, self.gru:
            x, _ = layer(x)
        h, _ = self.lstm_cell(self.rnn_cell(x[-1]))
        return self.head(self.gru_cell(h))


x = torch.randn(5, 4, 3)
dist.broadcast(x, 0)
alone, shared = Tagger(), Tagger()
alone(x).square().mean().backward()
if how == "ddp":
    shared = DistributedDataParallel(shared)
else:
    from torch.distributed.fsdp import fully_shard

    for module in (*shared.children(), shared):
        fully_shard(module)
for _ in range(2):
    shared.zero_grad()
    shared(x[:, 2 * rank : 2 * rank + 2]).square().mean().backward()
for (name, p), expected in zip(shared.named_parameters(), alone.parameters(), strict=True):
    grad = p.grad.full_tensor() if how == "fsdp" else p.grad
    torch.testing.assert_close(grad, expected.grad, msg=name)
dist.destroy_process_group()
"""


# FSDP in torch 2.6 needs CPU events.
version = tuple(map(int, torch.__version__.split(".")[:2]))
fsdp = pytest.mark.skipif(version < (2, 7), reason="needs torch 2.7")


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=fsdp)])
def test_gradients_of_two_processes(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), how, str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
