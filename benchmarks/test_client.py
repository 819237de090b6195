"""Whether the client of the engine `endpoint` could be what limits a server's figures: it reads from a server without
a model, which only writes.

    pytest benchmarks/test_client.py -s

What counts is how many streamed chunks a second of processor time is enough for: a server that is measured at R
tokens/s is not held back by a client that reads 20 R. "singly" is the dear case, a read of its own for every chunk.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from zbench.serving.client import Client, Load, read_stream
from zbench.serving.process import free_port

TOKENS, ROUNDS = 256, 3
MEASURED = 100.0  # tokens/s of a sequence of the default model on a CPU (docs/performance.md)
MARGIN = 20


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.server", str(port)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout and server.stdout.readline().strip() == "listening"
    found = Client(f"http://127.0.0.1:{port}/v1")
    yield found
    found.close()
    server.terminate()
    server.wait()


@pytest.mark.parametrize("how", ["null", "singly"])
@pytest.mark.parametrize("concurrency", [1, 8, 32])
def test_the_client_reads_far_faster_than_a_server_writes(client: Client, concurrency: int, how: str) -> None:
    bodies = [{"model": how, "max_tokens": TOKENS, "prompt": [1, 2, 3]} for _ in range(2 * concurrency)]
    rates, budgets = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        exchanges, cpu = client.run("/completions", bodies, Load(concurrency), 0)
        chunks = sum(len(read_stream(exchange.pieces).chunks) for exchange in exchanges)
        reads = sum(len(exchange.pieces) for exchange in exchanges)
        assert chunks == TOKENS * len(bodies)
        rates.append(chunks / (time.perf_counter() - start))
        budgets.append(chunks / cpu)
    print(
        f"\n{how}, {concurrency} at a time: {max(rates):,.0f} chunks/s, {max(budgets):,.0f} per processor second,"
        f" {chunks / reads:.1f} chunks a read"
    )
    assert max(budgets) >= MARGIN * MEASURED
