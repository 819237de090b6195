"""A server that speaks the OpenAI API, as one more engine: same prompts, same records, times seen from outside.

One `generate` is one load window: the prompts of a batch are sent as the load says (all at once without one), and it
ends with the last answer. Forwards and steps of a server are not seen; what it says of its own drafting is recorded
as it says it, by difference (`zbench/serving/counters.py`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zbench import prompts as prompting
from zbench.engines import Shared
from zbench.engines.base import Finish, Generated, Meter, Request
from zbench.records import ServedRecord, ServerRecord
from zbench.serving import counters
from zbench.serving.client import Answer, Client, EndpointError, Exchange, Load, api_key, read_stream
from zbench.serving.process import Wanted

if TYPE_CHECKING:
    import httpx

DEATH_SECONDS = 3.0  # how long after its connections a dying server may be there
SETTLE_SECONDS = 1.0  # how long a server's counters may lag behind its answers
_FINISH: dict[str, Finish] = {"length": "length", "stop": "eos"}
_OWN_SCHEDULE = "a diffusion model: it was sampled by the server's schedule, not as the scenario says"
_RESETS = {"vllm": "/reset_prefix_cache", "sglang": "/flush_cache"}
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "tensorrt_llm": "tensorrt_llm"}
_OWN_PATHS = {"/load_model": "transformers", "/extras/tokenize": "llama-cpp-python"}
_PREFIXES = {"vllm:": "vllm", "sglang:": "sglang", "llamacpp:": "llama.cpp", "trtllm_": "tensorrt_llm"}


class Endpoint:
    exact = False

    def __init__(self, options: Mapping[str, Any], shared: Shared) -> None:
        self.options, self.tokenizer, self.config = options, shared.tokenizer, shared.model.config
        self.server = shared.servers.ensure(Wanted.of(options, shared.model.path)) if options["server"] else None
        base = self.server.url if self.server else with_version(options["url"])
        variable = options["api_key_env"]
        self.client = Client(base, api_key(variable) if variable else None, options["timeout"], options["retries"])
        try:
            self.kind, self.version, self.model = self._identify()
            self.metrics = self._metrics_path()
            self.denoises = any("diffusion" in name for name, _ in self._read().samples)
            self.cache = self._cache_policy()
        except BaseException:
            self.close()
            raise
        chosen = options["load"]
        self.load = Load(**chosen) if chosen else Load()
        self.nonce = secrets.token_hex(3)  # of this engine: a server outlives runs, and so does its cache
        self.sent = 0
        self.kernels = {
            "server": f"{self.kind} {self.version}".strip(),
            "served model": self.model,
            "prefix cache": self.cache,
            "client": "httpx, streaming",
        }

    def close(self) -> None:
        self.client.close()

    def generate(self, prompts: Sequence[Sequence[int]], request: Request, meter: Meter) -> Generated:
        self._alive()
        if self.cache == "reset" and self.kind in _RESETS:
            emptied = self.client.post(_RESETS[self.kind], self.options["timeout"])
            if emptied is None or not emptied.is_success:
                raise EndpointError(f"{_RESETS[self.kind]} did not empty the prefix cache")
        sent = [self._own_prefix(ids) if self.cache == "unique" else list(ids) for ids in prompts]
        bodies = [self._body(ids, request, seed) for ids, seed in zip(sent, request.seeds, strict=True)]
        before = self._read()
        path = "/chat/completions" if self.options["api"] == "chat" else "/completions"
        exchanges, cpu = self.client.run(path, bodies, self.load, request.seeds[0])
        answers = self._answers(exchanges)
        told = counters.told(before, self._settled(), [_speculation(answer) for answer in answers])
        outputs, finishes, served = [], [], []
        for exchange, answer in zip(exchanges, answers, strict=True):
            finish = _FINISH[answer.finish]
            ids, record = self._record(exchange, answer, finish)
            if self._endless(request) and finish == "eos":
                raise EndpointError(f"the server ended a text after {len(ids)} tokens in spite of ignore_eos")
            outputs.append(ids)
            finishes.append(finish)
            served.append(record)
        return Generated(
            outputs,
            finishes,
            prompts=sent,
            served=served,
            wall_seconds=max(answer.ended for answer in answers),
            server=ServerRecord(
                kind=self.kind,
                version=self.version,
                speculation=told.speculation,
                diffusion=told.diffusion,
                why_not=told.why_not,
                client_cpu_seconds=cpu,
                load={"concurrency": self.load.concurrency, "rate": self.load.rate, "arrivals": self.load.arrivals},
                notes=(*told.notes, _OWN_SCHEDULE) if self.denoises else told.notes,
            ),
        )

    def _body(self, ids: list[int], request: Request, seed: int) -> dict[str, Any]:
        """Standard fields, and of the others only what was asked for: strict servers refuse what they do not know."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.limit,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.options["api"] == "chat":
            body["messages"] = [{"role": "user", "content": prompting.user_text(ids, self.tokenizer)}]
        else:
            body["prompt"] = ids if self.options["send"] == "tokens" else self._text(ids)
        if not self.denoises:  # vLLM's diffusion models have a schedule of their own, and refuse another
            body["temperature"] = request.sampling.temperature
        if not request.sampling.greedy and not self.denoises:
            body["seed"] = seed & 0x7FFFFFFF  # some servers keep it in 32 bits
            body["top_p"] = request.sampling.top_p
            if request.sampling.top_k is not None:
                body["top_k"] = request.sampling.top_k
        if self._endless(request):
            body["ignore_eos"] = True
            if self.kind in ("vllm", "sglang"):
                body["skip_special_tokens"] = False  # else the text lacks the ends that it went on after
        if self.kind == "vllm":
            body["return_token_ids"] = True
            if self.options["send"] == "text" and self.options["api"] == "completions":
                body["add_special_tokens"] = False
        if self.kind == "sglang":
            body["return_spec_tokens_details"] = True
        if self.kind == "llama.cpp" and self.cache == "reset":
            body["cache_prompt"] = False
        return {**body, **self.options["extra"]}

    def _endless(self, request: Request) -> bool:
        """Whether outputs are to go on after the end of the text."""
        return not request.eos_ids and bool(self.config.eos_ids)

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if self.tokenizer.encode(text, add_special_tokens=False) != ids:
            raise EndpointError("a prompt does not survive as text; set send: tokens, or leave context out")
        return text

    def _own_prefix(self, ids: Sequence[int]) -> list[int]:
        """The prompt with a few tokens of its own before the user's words, so that no cached prefix reaches them."""
        self.sent += 1
        mark = f"[{self.nonce}{self.sent:06d}] "
        return prompting.marked(ids, self.tokenizer, mark)

    def _answers(self, exchanges: Sequence[Exchange]) -> list[Answer]:
        """Every answer. Raises EndpointError if one request went wrong: figures of the others alone would flatter."""
        answers, problems = [], []
        for index, exchange in enumerate(exchanges):
            try:
                if exchange.error:
                    raise EndpointError(exchange.error)
                answers.append(answer := read_stream(exchange.pieces))
                if answer.finish not in _FINISH:
                    raise EndpointError(f"the server ended the text because of {answer.finish!r}")
            except EndpointError as error:
                problems.append((index, self.client.clean(str(error))))
        if not problems:
            return answers
        index, first = problems[0]
        dead = self.server.why_dead(patience=DEATH_SECONDS) if self.server else None
        hint = ""
        if self.options["send"] == "tokens" and self.options["api"] == "completions" and "prompt" in first:
            hint = " (if the server takes no token ids, set send: text)"
        raise EndpointError(
            f"{len(problems)} of {len(exchanges)} requests failed; request {index}: {first}{hint}"
            + (f"; {dead}" if dead else "")
        )

    def _record(self, exchange: Exchange, answer: Answer, finish: Finish) -> tuple[list[int], ServedRecord]:
        counted, prompt_tokens = (_count(answer.usage, key) for key in ("completion_tokens", "prompt_tokens"))
        if counted == 0:
            raise EndpointError("the server's usage counts no completion tokens beside a text")
        ids = self.tokenizer.encode(answer.text, add_special_tokens=False)
        # The token that ends a text shows in no text. Most servers count it.
        ended = int(finish == "eos" and counted != len(ids))
        tokenised = len(ids) + ended
        chunks = answer.chunks
        in_pieces = len(chunks) > 1 or len(ids) == 1  # of one piece no token but the last would have a time
        if ended and answer.token_ids is None and in_pieces and answer.finished > chunks[-1]:
            chunks = (*chunks, answer.finished)
        if answer.token_ids is not None:
            ids = list(answer.token_ids)
        elif ended and counted in (tokenised, None) and self.config.eos_ids:
            ids = [*ids, self.config.eos_ids[0]]
        return ids, ServedRecord(
            due_seconds=exchange.due,
            queued_seconds=exchange.sent - exchange.due,
            chunk_seconds=tuple(when - exchange.due for when in chunks),
            tokenised=tokenised,
            ids_from="text" if answer.token_ids is None else "server",
            prompt_tokens=prompt_tokens,
            output_tokens=counted,
            cached_tokens=next((n for e in answer.extras if (n := counters.cached_tokens(e)) is not None), None),
            attempts=exchange.attempts,
            speculation=_speculation(answer),
        )

    def _alive(self) -> None:
        if self.server and (why := self.server.why_dead()):
            raise EndpointError(why)

    def _identify(self) -> tuple[str, str, str]:
        """(kind, version, served model), from what the server lists and the names of its metrics."""
        listed = self.client.get("/v1/models")
        if listed is None or not listed.is_success:
            self._alive()
            said = "nothing answers" if listed is None else f"HTTP {listed.status_code}"
            raise EndpointError(f"{self.client.root}/v1/models: {said}; is the server up, and the url right?")
        models = _models(listed)
        if models is None:
            raise EndpointError(f"{self.client.root}/v1/models lists no models; is the url that of an OpenAI API?")
        named = self.options["served_model"]
        name = (
            (self.server.filled(named) if self.server else named)
            if named
            else next((m.get("id") for m in models), None)
        )
        if name is None:
            raise EndpointError("the server lists no model; give served_model")
        kind = _OWNERS.get(str(models[0].get("owned_by")) if models else "", "")
        if not kind:
            metrics = self.client.get("/metrics")
            text = metrics.text if metrics is not None and metrics.is_success else ""
            kind = next((kind for prefix, kind in _PREFIXES.items() if f"\n{prefix}" in f"\n{text}"), "")
        kind = kind or next((known for path, known in _OWN_PATHS.items() if self._offers(path)), "unknown")
        version = self.client.get("/version") if kind in ("vllm", "tensorrt_llm") else None
        number = version.json().get("version") if version is not None and version.is_success else None
        return kind, str(number or ""), str(name)

    def _offers(self, path: str) -> bool:
        """Whether the server says that it has this path."""
        described = self.client.get("/openapi.json")
        try:
            return described is not None and path in described.json().get("paths", {})
        except (ValueError, AttributeError):
            return False

    def _metrics_path(self) -> str | None:
        answer = self.client.get("/metrics")
        return "/metrics" if answer is not None and answer.is_success else None

    def _cache_policy(self) -> str:
        """ "reset", "unique", "keep", or "none" where there is no such cache. Raises EndpointError where a reset was
        asked for that the server has not."""
        wanted = self.options["prefix_cache"]
        if wanted not in ("auto", "reset"):
            return wanted
        if self.kind == "transformers" and self.server and "--continuous-batching" not in self.server.command:
            return "none"
        if self.kind == "llama.cpp":
            return "reset"  # cache_prompt: false in every request
        if self.kind in _RESETS:
            answer = self.client.post(_RESETS[self.kind])
            if answer is not None and answer.is_success:
                return "reset"
        if wanted == "reset":
            raise EndpointError(f"this server ({self.kind}) has no way to reset its prefix cache; use unique")
        return "unique"

    def _read(self) -> counters.Reading:
        answer = self.client.get(self.metrics) if self.metrics else None
        return counters.read(answer.text) if answer is not None and answer.is_success else counters.NOTHING

    def _settled(self) -> counters.Reading:
        """The counters once they stand still: servers update them a little after the last token has left."""
        reading, end = self._read(), time.monotonic() + SETTLE_SECONDS
        if not reading.samples:
            return reading  # iterations are gone once read
        while time.monotonic() < end:
            time.sleep(0.05)
            again = self._read()
            if _counting(again) == _counting(reading):
                return again
            reading = again
        return reading


def with_version(url: str) -> str:
    """An API's base: /v1 is added to a bare host."""
    bare = url.rstrip("/")
    return bare if "/" in bare.split("://", 1)[1] else f"{bare}/v1"


def _models(listed: httpx.Response) -> list[dict[str, Any]] | None:
    """What a server lists as its models; None where that is no such list."""
    try:
        data = listed.json()["data"]
    except (ValueError, TypeError, KeyError):
        return None
    return [model for model in data if isinstance(model, dict)] if isinstance(data, list) else None


def _count(usage: Mapping[str, Any], key: str) -> int | None:
    """Raises EndpointError where a server counts in anything but whole numbers from 0 on."""
    found = usage.get(key)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 0):
        raise EndpointError(f"the server's usage has {key} {found!r}, which counts nothing")
    return found


def _counting(reading: counters.Reading) -> dict[tuple[str, str], float]:
    return {key: value for key, value in reading.samples.items() if "spec_" in key[0] or "diffusion" in key[0]}


def _speculation(answer: Answer) -> Any:
    """The last word of a response on its drafting."""
    found = [said for extra in answer.extras if (said := counters.of_response(extra))]
    return found[-1] if found else None
