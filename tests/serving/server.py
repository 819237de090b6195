"""A server without a model: it streams letters as fast as it can, or misbehaves as the name of the model asks.

    python -m tests.serving.server PORT [OWNER] [SECONDS PER TOKEN]

Tests hold the client to it over a real socket; `benchmarks/test_client.py` measures the client against it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class State:
    def __init__(self, owner: str, seconds: float) -> None:
        self.owner, self.seconds = owner, seconds
        self.seen: list[dict[str, Any]] = []
        self.running = self.most = self.resets = 0


async def serve(port: int, owner: str, seconds: float) -> None:
    state = State(owner, seconds)
    server = await asyncio.start_server(lambda r, w: _connection(state, r, w), "127.0.0.1", port)
    print("listening", flush=True)
    async with server:
        await server.serve_forever()


async def _connection(state: State, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            line, *rest = head.decode().split("\r\n")
            method, path, _ = line.split(" ")
            headers = {k.lower(): v.strip() for k, _, v in (each.partition(":") for each in rest if each)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if method == "POST" and path.startswith("/v1/"):
                await _complete(state, path, headers, json.loads(body), writer)
            else:
                _answer(state, path, writer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def _answer(state: State, path: str, writer: asyncio.StreamWriter) -> None:
    n = len(state.seen)
    owner, _, kind = state.owner.partition("-")
    text: Any = {
        "/health": {},
        "/v1/models": {"data": [{"id": "null", "owned_by": owner}]},
        "/seen": {"bodies": state.seen, "most": state.most, "resets": state.resets},
        "/version": {"version": "0.0"},
        "/metrics": "\n".join(
            [
                f'vllm:diffusion_num_denoising_steps_total{{engine="0"}} {7 + 5 * n}',
                f'vllm:diffusion_num_canvas_positions_total{{engine="0"}} {112 + 80 * n}',
                f'vllm:diffusion_num_committed_tokens_total{{engine="0"}} {16 + 16 * n}',
            ]
            if kind == "diffusion"
            else [
                f'vllm:spec_decode_num_drafts_total{{engine="0"}} {100 + 4 * n}',
                f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {300 + 12 * n}',
                f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {50 + 6 * n}',
                f'vllm:request_success_total{{finished_reason="length"}} {n}',
            ]
        ),
    }.get(path)
    if path == "/metrics" and owner != "vllm":
        text = None
    if path == "/reset_prefix_cache" and owner == "vllm":
        state.resets += 1
        text = {}
    status = "404 Not Found" if text is None else "200 OK"
    _plain(writer, status, text if isinstance(text, str) else json.dumps(text))


def _plain(writer: asyncio.StreamWriter, status: str, text: str) -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())


async def _complete(
    state: State, path: str, headers: dict[str, str], body: dict[str, Any], writer: asyncio.StreamWriter
) -> None:
    state.seen.append({"path": path, "headers": headers, "body": body})
    how, limit = body["model"], body["max_tokens"]
    if how == "refuses" or (how == "busy-once" and len(state.seen) == 1):
        status = "401 Unauthorized" if how == "refuses" else "503 Service Unavailable"
        _plain(writer, status, json.dumps({"error": {"message": f"bad key {headers.get('authorization')}"}}))
        return
    if state.owner == "vllm-diffusion" and body.keys() & {"temperature", "seed"}:
        _plain(writer, "400 Bad Request", json.dumps({"error": {"message": "not supported with diffusion models"}}))
        return
    if how == "stalls":
        await asyncio.sleep(60)
    if how == "hangs-up":
        writer.close()
        return
    state.running += 1
    state.most = max(state.most, state.running)
    encoding = "Content-Encoding: gzip\r\n" if how == "compresses" else ""
    writer.write(f"HTTP/1.1 200 OK\r\n{encoding}Transfer-Encoding: chunked\r\n\r\n".encode())
    chat, step = path.endswith("chat/completions"), {"bundles": 3, "whole": limit}.get(how, 1)
    if chat:
        _event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    for start in range(0, limit, step):
        text = "".join(LETTERS[i % 26] for i in range(start, min(start + step, limit)))
        said: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
        if seconds := 0.02 if how == "slow" else state.seconds:
            await writer.drain()
            await asyncio.sleep(seconds)
        if how == "breaks" and start >= 2:
            state.running -= 1
            writer.close()
            return
        if how == "errs" and start >= 1:
            _event(writer, {"error": {"message": f"out of memory for {headers.get('authorization')}"}})
            break
        _event(writer, {"choices": [{"index": 0, **said, "finish_reason": None}]})
        if how == "singly" or start % 64 == 63:
            await writer.drain()
            await asyncio.sleep(0.001 if how == "singly" else 0)
    if how != "errs":
        counted = limit + (1 if how == "miscounts" else 0)
        prompt = body.get("prompt", body.get("messages"))
        usage: dict[str, Any] = {"prompt_tokens": len(prompt), "completion_tokens": counted}
        if how.startswith("usage "):
            usage |= json.loads(how.removeprefix("usage "))
        _event(writer, {"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "length"}]})
        _event(writer, {"choices": [], "usage": usage})
        _event(writer, "[DONE]")
    writer.write(b"0\r\n\r\n")
    state.running -= 1


def _event(writer: asyncio.StreamWriter, data: Any) -> None:
    line = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
    writer.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")


if __name__ == "__main__":
    _, at, *more = sys.argv
    asyncio.run(serve(int(at), more[0] if more else "me", float(more[1]) if len(more) > 1 else 0.0))
