"""What servers say of their drafting, on recorded answers (recorded/README.md): differences, and never a guess."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zbench.records import Speculation
from zbench.serving import counters
from zbench.serving.client import read_stream

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> Any:
    text = (RECORDED / name).read_text()
    return json.loads(text) if name.endswith(".json") else text


def later(text: str, by: dict[str, float]) -> str:
    """The same metrics with some samples grown."""
    lines = []
    for line in text.splitlines():
        sample = line.rsplit(" ", 1)
        grown = next((n for start, n in by.items() if line.startswith(start)), 0)
        lines.append(line if line.startswith("#") or not grown else f"{sample[0]} {float(sample[1]) + grown}")
    return "\n".join(lines)


def test_vllms_engines_are_summed_and_created_times_are_not_counts() -> None:
    reading = counters.read(recorded("vllm_metrics.txt"))
    assert reading.samples["vllm:spec_decode_num_drafts_total", ""] == 22 + 15 + 29 + 20 + 25 + 24 + 27 + 26


def vllm_answers(method: str) -> list[Any]:
    return [json.loads(line) for line in recorded(f"vllm_{method}_answers.jsonl").splitlines()]


@pytest.mark.parametrize(
    ("method", "drafts", "verifies", "accepted"),
    [("eagle3", 3, 97, (50, 29, 16)), ("dflash", 7, 112, (49, 16, 8, 2, 1, 0, 0)), ("ngram", 4, 27, (15, 10, 8, 8))],
)
def test_vllms_counters_gain_what_its_responses_say_and_what_its_tokens_show(
    method: str, drafts: int, verifies: int, accepted: tuple[int, ...]
) -> None:
    before, after = (counters.read(recorded(f"vllm_{method}_{when}.txt")) for when in ("before", "after"))
    answers = vllm_answers(method)
    gained = counters.told(before, after, [None] * len(answers))
    assert gained.speculation == Speculation(
        "vllm:spec_decode_num_* by difference", verifies, drafts * verifies, sum(accepted), accepted
    )
    assert gained.notes == () and gained.diffusion is None
    cumulative = counters.told(counters.NOTHING, after, [None] * len(answers))
    assert "others" in cumulative.notes[0]  # the warm-up, in which n-grams found nothing to draft
    assert (cumulative.speculation != gained.speculation) == (method != "ngram")

    each = [counters.of_response(answer["last_chunk"]) for answer in answers]
    summed = counters.told(before, after, each).speculation
    assert summed and gained.speculation
    assert replace(summed, source="") == replace(gained.speculation, source="")
    for said, answer in zip(each, answers, strict=True):
        assert said and said.verifies and said.accepted is not None
        tokens = sum(map(len, answer["token_ids"]))
        assert tokens == answer["last_chunk"]["usage"]["completion_tokens"] == 32
        mean = answer["last_chunk"]["metrics"]["speculative_decoding"]["mean_acceptance_length"]
        assert 1 + said.accepted / said.verifies == pytest.approx(mean)
        if method != "ngram":  # which has steps without a draft
            assert said.verifies == len(answer["token_ids"]) - 1  # the first chunk is the prefill's
            assert 0 <= 1 + said.verifies + said.accepted - tokens <= drafts  # the last step may go beyond the limit


def test_vllm_without_drafting_reports_none() -> None:
    after = counters.read(recorded("vllm_plain_after.txt"))
    told = counters.told(counters.NOTHING, after, [None] * 7)
    assert (told.speculation, told.why_not, told.notes) == (None, "not reported by the server", ())


def test_vllms_stream_is_read_with_its_token_ids_and_its_last_chunk() -> None:
    answer = read_stream([(0.0, (RECORDED / "vllm_stream.txt").read_bytes())])
    expected = vllm_answers("eagle3")[0]
    assert answer.token_ids == tuple(itertools.chain(*expected["token_ids"])) and answer.finish == "length"
    assert len(answer.chunks) == len(expected["token_ids"]) and answer.extras[-1] == expected["last_chunk"]
    assert answer.usage["completion_tokens"] == 32 and counters.cached_tokens(answer.extras[-1]) == 0


def test_counters_count_by_difference_and_never_cumulatively() -> None:
    before = recorded("llamacpp_metrics.txt")
    prefix = "llamacpp:spec_decode_num_"
    after = later(
        before,
        {
            f"{prefix}drafts": 10,
            f"{prefix}draft_tokens": 30,
            f"{prefix}accepted_tokens_total": 12,
            f'{prefix}accepted_tokens_per_pos_total{{position="0"}}': 9,
            f'{prefix}accepted_tokens_per_pos_total{{position="1"}}': 3,
        },
    )
    told = counters.told(counters.read(before), counters.read(after), [None])
    assert told.speculation == Speculation(f"{prefix}* by difference", 10, 30, 12, (9, 3, 0))
    nothing = counters.told(counters.read(after), counters.read(after), [None])
    assert nothing.speculation is None and "nothing was drafted" in nothing.why_not


def test_a_restarted_server_is_said_so_and_gives_no_figure() -> None:
    text = recorded("llamacpp_metrics.txt")
    told = counters.told(counters.read(later(text, {"llamacpp": 5})), counters.read(text), [None])
    assert told.speculation is None and "restarted" in told.why_not


def test_other_clients_of_the_server_are_noticed() -> None:
    before = 'vllm:request_success_total{finished_reason="stop"} 7.0'
    after = 'vllm:request_success_total{finished_reason="stop"} 9.0'
    assert counters.told(counters.read(before), counters.read(after), [None] * 2).notes == ()
    assert "others" in counters.told(counters.read(before), counters.read(after), [None]).notes[0]


def test_a_response_goes_before_the_whole_servers_counters_where_all_of_them_speak() -> None:
    said = counters.of_response(vllm_answers("ngram")[0]["last_chunk"])
    assert said == Speculation("metrics.speculative_decoding", 3, 12, 7, (3, 2, 1, 1))
    told = counters.told(counters.NOTHING, counters.NOTHING, [said, said]).speculation
    assert told is not None and (told.verifies, told.accepted, told.accepted_at) == (6, 14, (6, 4, 2, 2))
    assert counters.told(counters.NOTHING, counters.NOTHING, [said, None]).speculation is None


@pytest.mark.parametrize("place", [("sglext",), ("choices", 0, "meta_info"), ("metadata", "spec")])
def test_sglangs_object_is_found_wherever_a_release_puts_it(place: tuple) -> None:
    body: Any = recorded("sglang_sglext.json")
    for key in reversed(place):
        body = [body] if isinstance(key, int) else {key: body}
    said = counters.of_response(body)
    assert said == Speculation("spec_verify_ct", 43, 215, 63, (32, 18, 7, 3, 3))
    assert sum(said.accepted_at) == said.accepted


def test_a_mean_length_of_each_response_is_weighted_by_its_steps() -> None:
    bodies: list[Any] = [
        {"spec_verify_ct": steps, "spec_accept_length": length} for steps, length in ((10, 2.0), (30, 4.0))
    ]
    told = counters.told(
        counters.NOTHING, counters.NOTHING, [counters.of_response(body) for body in bodies]
    ).speculation
    assert told is not None and (told.verifies, told.length) == (40, pytest.approx(3.5))
    counted = recorded("sglang_sglext.json")
    both = [counters.of_response(body) for body in (bodies[0], counted)]
    mixed = counters.told(counters.NOTHING, counters.NOTHING, both).speculation
    assert mixed is not None and mixed.length is None


def test_sglangs_gauge_is_reported_as_the_gauge_that_it_is() -> None:
    reading = counters.read(recorded("sglang_metrics.txt"))
    said = counters.told(reading, reading, [None]).speculation
    assert said is not None and said.length == 2.8 and said.verifies is None and "gauge" in said.source


def test_sglangs_gauges_of_several_ranks_are_no_sum_and_zero_is_no_length() -> None:
    name = "sglang:spec_accept_length"
    of = [
        counters.read(f'{name}{{dp_rank="0"}} {a}\n{name}{{dp_rank="1"}} {b}\n')
        for a, b in ((3.2, 3.0), (0, 3), (0, 0))
    ]
    said = [counters.told(reading, reading, [None]).speculation for reading in of]
    assert said[0] is not None and said[0].length == pytest.approx(3.1) and "mean of 2 ranks" in said[0].source
    assert said[1] is not None and said[1].length == 3 and said[2] is None


@pytest.mark.parametrize("value", ["NaN", "+Inf", "1e999"])
def test_counters_that_are_no_numbers_are_not_there(value: str) -> None:
    after = counters.read(f"vllm:spec_decode_num_drafts_total {value}\nvllm:request_success_total {value}\n")
    assert counters.told(counters.NOTHING, after, [None]).speculation is None


def test_tensorrt_llms_damaged_iterations_are_left_out() -> None:
    after = counters.read(json.dumps(["{cut", 3, {"specDecodingStats": "none"}]))
    assert counters.told(counters.NOTHING, after, [None]).speculation is None


@pytest.mark.parametrize("usage", [[1], "many", {"prompt_tokens_details": "none"}])
def test_a_usage_that_is_none_says_nothing_of_the_cache(usage: Any) -> None:
    assert counters.cached_tokens({"usage": usage}) is None


def test_llamacpps_timings_count_drafts_but_no_verify_steps() -> None:
    said = counters.of_response({"timings": recorded("llamacpp_timings.json")})
    assert said == Speculation("timings", None, 347, 65)
    chunk = recorded("llamacpp_chunk.json")
    assert counters.of_response(chunk) is None  # nothing was drafted
    assert counters.cached_tokens(chunk) == 236


def test_tensorrt_llms_iterations_are_summed_unless_some_were_lost() -> None:
    spec = {"numDraftTokens": 24, "numAcceptedTokens": 12, "numRequestsWithDraftTokens": 8}
    one = {"iter": 1, "specDecodingStats": spec}
    none = {"iter": 2, "specDecodingStats": None}
    after = counters.read(json.dumps([one, none, one]))
    said = counters.told(counters.NOTHING, after, [None]).speculation
    assert said == Speculation("specDecodingStats of every iteration", 16, 48, 24)
    ranks = [one | {"attentionDpRank": rank} for rank in range(4)]  # they all repeat rank 0's figures
    assert counters.told(counters.NOTHING, counters.read(json.dumps([*ranks, *ranks])), [None]).speculation == said
    many = counters.told(counters.NOTHING, counters.read(json.dumps([one] * 1000)), [None])
    assert many.speculation is None and "lost" in many.why_not


def test_vllms_diffusion_counters_count_by_difference() -> None:
    """Three requests of 40 tokens: three canvases of 16 positions each, all of them evaluated in every step."""
    before, after = (counters.read(recorded(f"vllm_diffusion_{when}.txt")) for when in ("before", "after"))
    answers = vllm_answers("diffusion")
    told = counters.told(before, after, [counters.of_response(answer["last_chunk"]) for answer in answers])
    assert told.diffusion == {"steps": 81, "committed": 144, "positions": 16 * 81}
    assert told.diffusion["committed"] == 3 * 3 * 16 > sum(len(ids) for a in answers for ids in a["token_ids"]) == 120
    assert (told.speculation, told.why_not, told.notes) == (None, "not reported by the server", ())
    assert counters.told(after, after, []).diffusion is None


def test_an_unknown_server_reports_nothing() -> None:
    told = counters.told(counters.NOTHING, counters.NOTHING, [None])
    assert told.speculation is None and told.why_not == "not reported by the server"


@given(st.text())
def test_whatever_metrics_says_is_read_without_error(text: str) -> None:
    counters.read(text)


@given(st.lists(st.integers(1, 40), max_size=12))
def test_a_stream_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    whole = (RECORDED / "transformers_stream.txt").read_bytes()
    pieces, start = [], 0
    for cut in cuts:
        pieces.append((float(len(pieces)), whole[start : start + cut]))
        start += cut
    pieces.append((float(len(pieces)), whole[start:]))
    answer = read_stream(pieces)
    assert answer.finish == "length" and answer.usage["completion_tokens"] == 8
    assert list(answer.chunks) == sorted(answer.chunks)
    assert answer.text == read_stream([(0.0, whole)]).text
