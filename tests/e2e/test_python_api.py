"""`LLM` and `AsyncLLM` on the embedded model: every way to ask gives the same answer, and all end cleanly."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mmserve import AsyncLLM
from mmserve.evaluation.suites import Example
from mmserve.llm import LLM
from mmserve.offline.prompts import read_messages
from mmserve.request import MediaOptions
from mmserve.sampling import SamplingParams
from tests.offline.fakes import wait_until

from .conftest import Conversation, ask

EXIT_S = 120.0
SHORT = SamplingParams(max_tokens=6)
FOREVER = SamplingParams(max_tokens=2000, ignore_eos=True)

SCRIPT = """
import sys
from mmserve import LLM, SamplingParams

llm = LLM(threads=1)
asked = [{"role": "user", "content": "What is red?"}]
forever = SamplingParams(max_tokens=2000, ignore_eos=True)
try:
    print("running", flush=True)
    llm.chat([asked] * 100, forever)
except KeyboardInterrupt:
    assert llm.chat(asked, SamplingParams(max_tokens=3))[0].outputs[0].token_ids
    print("interrupted", flush=True)
stream = llm.stream(asked, forever)
print(next(stream).index, llm._runtime._run_dir.path, flush=True)
"""


@pytest.fixture(scope="module")
def asked(basic_clips: list[tuple[Path, Example]]) -> Conversation:
    clip, example = basic_clips[4]
    return ask(clip, example.question.text)


def test_a_prompt_by_hand_is_answered_as_its_conversation(llm: LLM, asked: Conversation) -> None:
    (expected,) = llm.chat(asked, SHORT)
    ids = read_messages(asked, llm.chat_format, MediaOptions()).token_ids
    text = llm.chat_format.tokenizer.decode(list(ids), skip_special_tokens=False)
    data = {"video": asked[0]["content"][0]["video"]}
    outputs = llm.generate(
        [
            {"prompt": text, "multi_modal_data": data},
            {"prompt_token_ids": ids, "multi_modal_data": data},
        ],
        SHORT,
    )
    for output in outputs:
        assert output.prompt_token_ids == expected.prompt_token_ids
        assert output.outputs == expected.outputs


def test_a_stream_says_what_chat_says_and_ends_when_it_is_closed(llm: LLM, asked: Conversation) -> None:
    (expected,) = llm.chat(asked, SHORT)
    chunks = list(llm.stream(asked, SHORT))
    assert "".join(chunk.text for chunk in chunks) == expected.outputs[0].text
    assert chunks[-1].finish_reason is expected.outputs[0].finish_reason
    endless = llm.stream(asked, FOREVER)
    next(endless)
    del endless
    wait_until(lambda: llm._runtime.pipeline.counts()["active"] == 0)


def test_answers_to_one_prompt_are_those_of_their_seeds(llm: LLM, asked: Conversation) -> None:
    params = partial(SamplingParams, max_tokens=6, temperature=2.0, ignore_eos=True)
    (together,) = llm.chat(asked, params(n=4, seed=3))
    alone = llm.chat([asked] * 4, [params(seed=seed) for seed in range(3, 7)])
    assert [each.token_ids for each in together.outputs] == [each.outputs[0].token_ids for each in alone]
    assert len({each.token_ids for each in together.outputs}) > 1
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert together.usage.completion_tokens == 4 * 6
    timings = together.timings_ms
    assert timings.ttft + timings.generate == pytest.approx(timings.total)


def test_log_probabilities_of_the_prompt_are_those_of_generating_it(llm: LLM, asked: Conversation) -> None:
    (output,) = llm.chat(asked, SamplingParams(max_tokens=4, ignore_eos=True, logprobs=0, prompt_logprobs=1))
    found = output.prompt_logprobs
    assert found is not None
    assert len(found) == len(output.prompt_token_ids)
    assert found[0] is None
    for token, candidates in zip(output.prompt_token_ids[1:], found[1:], strict=True):
        assert candidates is not None
        assert candidates[token].decoded_token == llm.chat_format.token_text(token)
    answer = output.outputs[0]
    assert answer.logprobs is not None
    (again,) = llm.generate(
        {
            "prompt_token_ids": read_messages(asked, llm.chat_format, MediaOptions()).token_ids
            + answer.token_ids,
            "multi_modal_data": {"video": asked[0]["content"][0]["video"]},
        },
        SamplingParams(max_tokens=1, prompt_logprobs=0),
    )
    assert again.prompt_logprobs is not None
    for token, generated, read in zip(
        answer.token_ids, answer.logprobs, again.prompt_logprobs[-4:], strict=True
    ):
        assert read is not None
        assert read[token].logprob == pytest.approx(generated[token].logprob, abs=2e-3)


def test_arrays_leave_nothing_behind(llm: LLM) -> None:
    frames = np.zeros((2, 32, 32, 3), np.uint8)
    prompt = {"prompt": "<video>\nWhat moves?", "multi_modal_data": {"video": (frames, {"fps": 1.0})}}
    llm.generate([prompt] * 3, SHORT)
    wait_until(lambda: not list(llm._runtime._run_dir.path.glob("*.npy")))


def test_a_loop_gets_the_same_answers(llm: LLM, asked: Conversation) -> None:
    expected = llm.chat(asked, SHORT)[0].outputs

    async def main() -> None:
        async with AsyncLLM(threads=1) as served:
            task = asyncio.create_task(served.chat([asked] * 8, FOREVER))
            outputs, streamed = await asyncio.gather(served.chat(asked, SHORT), _joined(served, asked))
            assert outputs[0].outputs == expected
            assert streamed == expected[0].text
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until, lambda: served._runtime.pipeline.counts()["active"] == 0)

    asyncio.run(main())


async def _joined(served: AsyncLLM, asked: Conversation) -> str:
    return "".join([chunk.text async for chunk in served.stream(asked, SHORT)])


def test_a_script_that_is_interrupted_and_closes_nothing_ends_cleanly() -> None:
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=EXIT_S)
    first, last = output.splitlines()
    assert first == "interrupted"
    assert not Path(last.removeprefix("0 ")).exists()
    assert (process.returncode, errors) == (0, "")
