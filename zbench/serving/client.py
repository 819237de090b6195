"""An asynchronous client of the OpenAI API that does as little as possible while a server streams.

Bodies are encoded before the clock starts. While a response streams, each piece is kept with the time it came, and
only read once the whole load is over: parsing takes no time from the requests that still run.
"""

from __future__ import annotations

import asyncio
import json
import operator
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from zbench.errors import UserError

CONNECT_SECONDS = 10.0
_BUSY = (429, 503)  # refused before any work was done, so that sending again measures nothing twice
_SHOWN = 300  # characters of a server's error


class EndpointError(RuntimeError):
    """A server that refused, broke off or was too slow."""


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive. Without a rate a request is due when a place is free (closed loop)."""

    concurrency: int | None = None
    rate: float | None = None
    arrivals: Literal["poisson", "constant"] = "poisson"

    def due(self, count: int, seed: int) -> list[float]:
        """Seconds after the start at which each request is due; all 0 in a closed loop."""
        if self.rate is None:
            return [0.0] * count
        draw = random.Random(seed)
        gaps = (draw.expovariate(self.rate) if self.arrivals == "poisson" else 1 / self.rate for _ in range(count - 1))
        times = [0.0]
        for gap in gaps:
            times.append(times[-1] + gap)
        return times


@dataclass(slots=True)
class Exchange:
    """One request as it happened. Times are seconds after the start of the load; `error` is None if it went well."""

    due: float = 0.0
    sent: float = 0.0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    attempts: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A stream, read. `chunks` holds when each chunk with text came."""

    text: str
    token_ids: tuple[int, ...] | None
    finish: str
    chunks: tuple[float, ...]
    finished: float  # when it said why the text ends
    ended: float  # when its last event came
    usage: Mapping[str, Any]
    extras: tuple[Mapping[str, Any], ...]  # chunks that say more than text: usage, timings, metrics


def api_key(variable: str) -> str:
    """The key that a variable of the environment holds, without the line end that files of secrets close with. Raises
    UserError where it holds none, or one that no request can carry."""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"endpoint: the environment has no {variable}; export it, the key is never written")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"endpoint: {variable} holds a line end or another character that no API key has")
    return key


class Client:
    """Keeps its connections over trials. Not thread-safe: it owns an event loop."""

    def __init__(self, base: str, key: str | None = None, timeout: float = 600.0, retries: int = 0) -> None:
        self.base, self.timeout, self.retries = base.rstrip("/"), timeout, retries
        self.root = self.base.removesuffix("/v1")
        self._key = key
        self._runner = asyncio.Runner()
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        # No proxies and no .netrc: neither belongs between a benchmark and what it measures.
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    def close(self) -> None:
        try:
            self._runner.run(self._http.aclose())
        finally:
            self._runner.close()

    def get(self, path: str, seconds: float = CONNECT_SECONDS) -> httpx.Response | None:
        """GET at the server's root; None where nothing answers."""
        return self._runner.run(self._simple("GET", path, seconds))

    def post(self, path: str, seconds: float = CONNECT_SECONDS) -> httpx.Response | None:
        return self._runner.run(self._simple("POST", path, seconds))

    async def _simple(self, method: str, path: str, seconds: float) -> httpx.Response | None:
        try:
            return await self._http.request(method, self.root + path, timeout=seconds)
        except httpx.HTTPError:
            return None

    def run(
        self, path: str, bodies: Sequence[Mapping[str, Any]], load: Load, seed: int
    ) -> tuple[list[Exchange], float]:
        """Send every body to `path` under `load`. Returns the exchanges and the processor seconds of this thread."""
        encoded = [json.dumps(body, separators=(",", ":")).encode() for body in bodies]
        cpu = time.thread_time()
        exchanges = self._runner.run(self._load(path, encoded, load, seed))
        return exchanges, time.thread_time() - cpu

    async def _load(self, path: str, bodies: Sequence[bytes], load: Load, seed: int) -> list[Exchange]:
        places = asyncio.Semaphore(load.concurrency or len(bodies))
        url, start = self.base + path, time.perf_counter()
        exchanges = [Exchange(due=due) for due in load.due(len(bodies), seed)]

        async def one(exchange: Exchange, body: bytes) -> None:
            if (wait := exchange.due - (time.perf_counter() - start)) > 0:
                await asyncio.sleep(wait)
            async with places:
                exchange.sent = time.perf_counter() - start
                if load.rate is None:
                    exchange.due = exchange.sent
                try:
                    async with asyncio.timeout(self.timeout):
                        await self._exchange(url, body, exchange, start)
                except TimeoutError:
                    exchange.error = f"took more than {self.timeout:g} s"

        await asyncio.gather(*(one(e, b) for e, b in zip(exchanges, bodies, strict=True)))
        return exchanges

    async def _exchange(self, url: str, body: bytes, exchange: Exchange, start: float) -> None:
        clock, pieces = time.perf_counter, exchange.pieces
        while True:
            exchange.attempts += 1
            exchange.error = None
            again = False  # whether the server has surely done nothing for this request yet
            try:
                async with self._http.stream("POST", url, content=body) as response:
                    again = response.status_code in _BUSY
                    if response.status_code != httpx.codes.OK:
                        await response.aread()
                        exchange.error = self._said(response)
                    elif "content-encoding" in response.headers:
                        exchange.error = "the server compresses its stream, whose times then mean nothing"
                    else:
                        async for piece in response.aiter_raw():
                            pieces.append((clock() - start, piece))
            except httpx.TimeoutException as error:
                exchange.error = f"{_name(error)} after {clock() - start - exchange.sent:.1f} s"
                again = isinstance(error, httpx.ConnectTimeout)
            except httpx.HTTPError as error:
                exchange.error = self.clean(f"{_name(error)}: {error}" if str(error) else _name(error))
                again = isinstance(error, httpx.ConnectError)  # one that has read the request may have worked on it
            if exchange.error is None or not again or pieces or exchange.attempts > self.retries:
                return
            await asyncio.sleep(0.1 * 2**exchange.attempts)

    def _said(self, response: httpx.Response) -> str:
        """A server's refusal in one line."""
        try:
            body = response.json()
        except ValueError:
            body = response.text
        for key in ("error", "message", "detail"):
            body = body[key] if isinstance(body, dict) and key in body else body
        text = " ".join(str(body).split())
        if response.has_redirect_location:
            text = f"redirects to {response.headers['location']}"
        return self.clean(f"HTTP {response.status_code}: {text}")

    def clean(self, text: str) -> str:
        """Its beginning, without the API key, which some servers repeat."""
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN]


def _name(error: Exception) -> str:
    return type(error).__name__


def read_stream(pieces: Iterable[tuple[float, bytes]]) -> Answer:
    """What a stream of server-sent events said. Raises EndpointError where it broke off or carries an error."""
    text: list[str] = []
    ids: list[int] = []
    chunks: list[float] = []
    extras: list[Mapping[str, Any]] = []
    finish, finished, whole = None, 0.0, True
    usage: Mapping[str, Any] = {}
    pieces, ended = list(pieces), None
    for when, data in _events(pieces):
        ended = when
        if data == b"[DONE]":
            break
        try:
            event = json.loads(data)
        except ValueError:
            raise EndpointError(f"a chunk is not JSON: {data[:80]!r}") from None
        if not isinstance(event, dict):
            raise EndpointError(f"a chunk is no object: {data[:80]!r}")
        if problem := event.get("error") or ("choices" not in event and event.get("message")):
            message = problem.get("message", problem) if isinstance(problem, dict) else problem
            raise EndpointError(f"in the stream: {message}")
        usage = event.get("usage") or usage
        choices = event.get("choices") or ()
        if not isinstance(usage, dict) or not isinstance(choices, list | tuple):
            raise EndpointError(f"a chunk is not what the API has: {data[:80]!r}")
        for choice in choices:
            try:
                said = choice.get("text") or _content(choice.get("delta") or {})
                given = choice.get("token_ids")
                if said or given:
                    chunks.append(when)
                    text.append("" + said)
                    whole = whole and given is not None
                    ids += map(operator.index, given or ())
                if reason := choice.get("finish_reason"):
                    finish, finished = reason, when
            except (AttributeError, TypeError):
                raise EndpointError(f"a chunk is not what the API has: {data[:80]!r}") from None
        if not choices or event.keys() & {"usage", "timings", "metrics", "sglext", "metadata"} or finish:
            extras.append(event)
    if ended is None:
        begins = b"".join(piece for _, piece in pieces)[:80]
        raise EndpointError(f"no stream of events came, but {begins!r}" if begins else "the server answered nothing")
    if finish is None:
        raise EndpointError("the stream broke off before it said why the text ends")
    if not chunks:
        raise EndpointError("the stream carried no text")
    given_ids = tuple(ids) if whole else None
    return Answer("".join(text), given_ids, finish, tuple(chunks), finished, ended, usage, tuple(extras))


def _content(delta: Mapping[str, Any]) -> str:
    """Text of a chat chunk; thoughts are output too, under either of the names that servers use."""
    parts = (delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content"))
    return "".join(part for part in parts if part)


def _events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each event, with the time at which its line was complete."""
    rest, when = b"", 0.0
    for when, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from ((when, line[5:].strip()) for line in lines if line.startswith(b"data:"))
    if rest.startswith(b"data:"):
        yield when, rest[5:].strip()
