"""The client against a server without a model, over a real socket: load, order, refusals, broken streams."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbench.serving.client import Client, EndpointError, Load, read_stream
from zbench.serving.process import free_port

KEY = "sk-very-secret"


@pytest.fixture
def server() -> Iterator[str]:
    port = free_port()
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.server", str(port)], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout and running.stdout.readline().strip() == "listening"
    yield f"http://127.0.0.1:{port}/v1"
    running.terminate()
    running.wait()


@pytest.fixture
def client(server: str) -> Iterator[Client]:
    found = Client(server, KEY, timeout=2.0)
    yield found
    found.close()


def bodies(model: str, count: int = 1, tokens: int = 5) -> list[dict[str, Any]]:
    return [{"model": model, "max_tokens": tokens, "prompt": [i]} for i in range(count)]


def test_a_stream_becomes_text_with_a_time_for_every_chunk(client: Client) -> None:
    (exchange,), cpu = client.run("/completions", bodies("null"), Load(), 0)
    answer = read_stream(exchange.pieces)
    assert (answer.text, answer.finish, answer.usage["completion_tokens"]) == ("abcde", "length", 5)
    assert len(answer.chunks) == 5 and list(answer.chunks) == sorted(answer.chunks)
    assert exchange.due == exchange.sent < answer.chunks[0] and cpu > 0


def test_a_chat_stream_begins_with_its_first_words_not_with_its_role(client: Client) -> None:
    (exchange,), _ = client.run("/chat/completions", bodies("slow", tokens=3), Load(), 0)
    answer = read_stream(exchange.pieces)
    assert answer.text == "abc" and len(answer.chunks) == 3
    assert answer.chunks[0] > exchange.pieces[0][0]


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3), (None, 6)])
def test_a_closed_load_keeps_to_its_concurrency_and_waits_for_nothing_else(
    client: Client, concurrency: int | None, most: int
) -> None:
    exchanges, _ = client.run("/completions", bodies("slow", 6, tokens=20), Load(concurrency), 0)
    seen = client.get("/seen")
    assert seen is not None and seen.json()["most"] == most
    assert all(exchange.due == exchange.sent for exchange in exchanges)


def test_an_open_load_counts_what_waits_for_a_place(client: Client) -> None:
    exchanges, _ = client.run("/completions", bodies("slow", 4), Load(1, rate=1000.0), 0)
    assert all(e.sent >= e.due for e in exchanges)
    waited = sorted(e.sent - e.due for e in exchanges)
    assert waited[-1] > 0.2  # the last one waits for three that take 0.1 s each


@given(st.integers(1, 50), st.floats(0.1, 1e4), st.integers(0, 2**40), st.sampled_from(["poisson", "constant"]))
def test_arrivals_begin_at_once_in_order_and_repeat_with_their_seed(
    count: int, rate: float, seed: int, how: Any
) -> None:
    due = Load(rate=rate, arrivals=how).due(count, seed)
    assert due[0] == 0 and due == sorted(due) and len(due) == count
    assert due == Load(rate=rate, arrivals=how).due(count, seed)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    due = Load(rate=8.0).due(20_001, 1)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.03) and variance == pytest.approx(mean**2, rel=0.08)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("refuses", r"HTTP 401: bad key Bearer \*\*\*"),
        ("breaks", "RemoteProtocolError"),
        ("stalls", "ReadTimeout|took more than 2 s"),
        ("compresses", "compresses its stream"),
    ],
)
def test_what_goes_wrong_is_one_line_without_the_key(client: Client, model: str, said: str) -> None:
    (exchange,), _ = client.run("/completions", bodies(model), Load(), 0)
    assert exchange.error and re.search(said, exchange.error) and KEY not in exchange.error
    assert exchange.attempts == 1


def test_an_error_within_a_stream_and_a_stream_without_an_end_are_no_answers(client: Client) -> None:
    (exchange,), _ = client.run("/completions", bodies("errs"), Load(), 0)
    assert exchange.error is None
    with pytest.raises(EndpointError, match="out of memory"):
        read_stream(exchange.pieces)
    with pytest.raises(EndpointError, match="broke off"):
        read_stream([(0.0, b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n')])
    with pytest.raises(EndpointError, match="no text"):
        read_stream([(0.0, b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n')])
    with pytest.raises(EndpointError, match="not JSON"):
        read_stream([(0.0, b"data: <html>\n\n")])
    for said, reason in (
        (b"<html>log in</html>", "no stream of events came, but b'<html>log in"),
        (b'{"choices": [{"text": "a", "finish_reason": "stop"}]}', "no stream of events came"),
        (b"", "the server answered nothing"),
        (b'event: error\ndata: {"object": "error", "message": "KV cache full"}\n\n', "in the stream: KV cache full"),
        (b'data: {"choices": [{"text": 3, "finish_reason": "stop"}]}\n\n', "not what the API has"),
        (b'data: {"choices": [{"delta": {"content": ["a"]}}]}\n\n', "not what the API has"),
        (b'data: {"choices": [{"text": "a", "token_ids": ["7"]}]}\n\n', "not what the API has"),
        (b'data: {"choices": "a"}\n\n', "not what the API has"),
        (b'data: {"choices": [], "usage": [1]}\n\n', "not what the API has"),
    ):
        with pytest.raises(EndpointError, match=reason):
            read_stream([(0.0, said)])


def test_a_stream_ends_with_its_last_event_whatever_follows() -> None:
    said = b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\n'
    pieces = [(1.0, said), (2.0, b"data: [DONE]\n\n"), (5.0, b": bye\n\n")]
    assert read_stream(pieces).ended == 2.0
    assert read_stream(pieces[:1]).ended == 1.0


def test_a_request_that_a_server_has_read_is_not_sent_again(server: str) -> None:
    client = Client(server, retries=2)
    (exchange,), _ = client.run("/completions", bodies("hangs-up"), Load(), 0)
    assert exchange.error and exchange.attempts == 1
    client.close()
    nowhere = Client(f"http://127.0.0.1:{free_port()}/v1", retries=1)
    (exchange,), _ = nowhere.run("/completions", bodies("null"), Load(), 0)
    assert exchange.error and exchange.attempts == 2
    nowhere.close()


def test_only_a_request_that_was_turned_away_at_once_is_sent_again_and_only_if_asked(server: str) -> None:
    once = Client(server, retries=0)
    (exchange,), _ = once.run("/completions", bodies("busy-once"), Load(), 0)
    assert exchange.error and exchange.error.startswith("HTTP 503") and exchange.attempts == 1
    once.close()
    again = Client(server, retries=2)
    assert again.run("/completions", bodies("breaks"), Load(), 0)[0][0].attempts == 1  # it had begun to answer
    again.close()


def test_a_retried_request_keeps_its_time_of_submission(server: str) -> None:
    client = Client(server, retries=1)
    (exchange,), _ = client.run("/completions", bodies("busy-once"), Load(), 0)
    assert exchange.error is None and exchange.attempts == 2
    assert read_stream(exchange.pieces).chunks[0] - exchange.due > 0.15  # the pause counts
    client.close()


def test_nothing_answers_where_no_server_is() -> None:
    client = Client(f"http://127.0.0.1:{free_port()}/v1")
    assert client.get("/v1/models") is None
    (exchange,), _ = client.run("/completions", bodies("null"), Load(), 0)
    assert exchange.error and exchange.error.startswith("ConnectError")
    client.close()


def test_server_given_token_ids_are_kept_only_where_every_chunk_has_them() -> None:
    def stream(*choices: str) -> list[tuple[float, bytes]]:
        return [(float(i), f'data: {{"choices": [{c}]}}\n\n'.encode()) for i, c in enumerate(choices)]

    end = '{"text": "", "finish_reason": "stop", "token_ids": [2]}'
    with_ids = stream('{"text": "a", "token_ids": [7, 8]}', end)
    assert read_stream(with_ids).token_ids == (7, 8, 2)
    assert read_stream(stream('{"text": "a"}', end)).token_ids is None
