"""A policy that runs a causal language model in this process, with the requests of concurrent agents in one batch.

Simplified: a batch lasts as long as its longest reply; a serving engine would let other requests join at each token.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from k25lite.swarm.policy import Message, Reply, ToolCall

_TAGS = ("<tool_call>", "</tool_call>")
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]+)"')


@dataclass(slots=True)
class _Request:
    ids: list[int]
    seed: int
    written: asyncio.Future[list[int]]


class _Waiting:
    """Requests of one event loop that wait for the next batch, and the task that makes batches of them."""

    def __init__(self, policy: LocalPolicy):
        self.loop = asyncio.get_running_loop()
        self.requests, self.is_full = deque[_Request](), asyncio.Event()
        self.work = self.loop.create_task(policy._work(self))


class LocalPolicy:
    """A transformers causal language model, or a K25Lite that reads text, as a policy.

    Requests that wait at the same time are one batch; those that come while it is under way are the next. A reply does not
    depend on the rest of its batch (beyond the last bits of the arithmetic). If a batch fails, its halves are tried, and so
    on: only requests that fail alone fail.

    Args:
        model: is put into evaluation mode, and on `device` if one is given.
        max_new_tokens: of a reply; one that has no end by then is a refusal, as it is with an endpoint.
        max_batch: requests at once. wait: seconds that a batch which is not full waits for more.
        temperature: 0 takes the likeliest token.
        render: makes the prompt of messages and tool schemas; by default the tokenizer's chat template.
        parse: makes the reply of the text that was written, without special tokens; by default `parse_calls`.
        seed: of the samples. Policies with the same seed answer the same prompts alike, in whatever order they come.

    Raises:
        ValueError: there is no token that ends a reply, or a number is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 256,
        max_batch: int = 64,
        wait: float = 0.005,
        temperature: float = 0.0,
        render: Callable[[Sequence[Message], Sequence[dict[str, Any]]], str] | None = None,
        parse: Callable[[str], Reply] | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ):
        if max_new_tokens < 1 or max_batch < 1 or wait < 0 or temperature < 0:
            raise ValueError("max_new_tokens and max_batch are above 0, wait and temperature are not below")
        ends = model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        if not self.ends:
            raise ValueError("neither the model nor the tokenizer knows a token that ends a reply")
        self.model = (model if device is None else model.to(device)).eval()
        self.tokenizer, self.max_new_tokens, self.max_batch, self.wait = tokenizer, max_new_tokens, max_batch, wait
        self.render, self.parse, self.temperature = render or self._render, parse or parse_calls, temperature
        self.seed = secrets.randbits(32) if seed is None else seed
        self.window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        added = tokenizer.added_tokens_decoder.items()
        self.hidden = self.ends | {token_id for token_id, token in added if token.special and str(token) not in _TAGS}
        self._asked = Counter[bytes]()
        self._waiting: _Waiting | None = None
        self._lock = threading.Lock()  # of the model, which event loops of several threads may share

    async def __call__(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> Reply:
        """
        Raises:
            ValueError: prompt and reply do not fit the model's window. Whatever the model raises.
        """
        ids = self.tokenizer(self.render(messages, tools), add_special_tokens=False)["input_ids"]
        if not ids or (self.window and len(ids) + self.max_new_tokens > self.window):
            raise ValueError(
                f"a window of {self.window} for {len(ids)} tokens of prompt, {self.max_new_tokens} of reply"
            )
        loop = asyncio.get_running_loop()
        waiting = self._waiting
        if waiting is None or waiting.loop is not loop or waiting.work.done():
            waiting = self._waiting = _Waiting(self)
        request = _Request(ids, self._seed_of(ids), loop.create_future())
        waiting.requests.append(request)
        if len(waiting.requests) >= self.max_batch:
            waiting.is_full.set()
        written = await request.written
        kept = [token_id for token_id in written if token_id not in self.hidden]
        reply = self.parse(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))
        if not (reply.calls or reply.refusal or written[-1] in self.ends):
            reply = replace(reply, refusal=f"cut off after {len(written)} tokens (length)")
        return replace(reply, prompt_tokens=len(ids), completion_tokens=len(written))

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        messages = copy.deepcopy(list(messages))
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            with suppress(ValueError):  # templates want objects
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return self.tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, add_generation_prompt=True, tokenize=False
        )

    def _seed_of(self, ids: list[int]) -> int:
        """Of the prompt, and of how often it was asked before: agents come in any order."""
        if not self.temperature:
            return 0
        prompt = blake2b(f"{self.seed} {ids}".encode(), digest_size=7).digest()
        self._asked[prompt] += 1
        return int.from_bytes(blake2b(prompt + str(self._asked[prompt]).encode(), digest_size=7).digest())

    async def _work(self, waiting: _Waiting) -> None:
        """Batch after batch, until nobody waits."""
        requests, batch = waiting.requests, list[_Request]()
        try:
            while requests:
                if len(requests) < self.max_batch:
                    waiting.is_full.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(waiting.is_full.wait(), self.wait)
                batch = [requests.popleft() for _ in range(min(len(requests), self.max_batch))]
                await self._answer(batch)
        finally:
            for request in (*batch, *requests):
                request.written.cancel()

    async def _answer(self, batch: list[_Request]) -> None:
        batch = [request for request in batch if not request.written.done()]
        if not batch:
            return
        try:
            for request, written in zip(batch, await asyncio.to_thread(self._generate, batch), strict=True):
                if not request.written.done():
                    request.written.set_result(written)
            return
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].written.done():
                    batch[0].written.set_exception(error)
                return
        # Outside of the handler: the error would keep the memory of the batch that failed.
        await self._answer(batch[: len(batch) // 2])
        await self._answer(batch[len(batch) // 2 :])

    def _generate(self, batch: list[_Request]) -> list[list[int]]:
        """The tokens written for each request, up to the one that ends it."""
        device = self.model.device
        rows = [torch.tensor(request.ids, device=device) for request in batch]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.ends)
        generators = [torch.Generator(device).manual_seed(request.seed) for request in batch]

        def sample(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Each row by its own generator: the largest sum with Gumbel noise is a sample (Gumbel-max)."""
            noise = [
                torch.empty_like(row).exponential_(generator=of) for row, of in zip(scores, generators, strict=True)
            ]
            return scores / self.temperature - torch.stack(noise).log()

        def is_left(ids: torch.Tensor, scores: Any) -> torch.Tensor:
            """Which rows nobody waits for any more."""
            return torch.tensor([request.written.done() for request in batch], device=device)

        with self._lock:
            ids = self.model.generate(
                input_ids=pad_sequence(rows, True, pad, "left"),
                attention_mask=pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left"),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=sorted(self.ends),
                pad_token_id=pad,
                logits_processor=[sample] if self.temperature else [],
                stopping_criteria=[is_left],
            )
        written = ids[:, max(map(len, rows)) :].tolist()
        lengths = [next((n for n, token_id in enumerate(row, 1) if token_id in self.ends), len(row)) for row in written]
        return [row[:length] for row, length in zip(written, lengths, strict=True)]


def parse_calls(text: str) -> Reply:
    """What was written, with calls as Hermes and Qwen write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>.

    A block that is no JSON is a call with the whole block as its arguments, which no tool takes, if it has a name at least;
    otherwise it is content. The last block need not be closed.
    """
    calls: list[ToolCall] = []

    def take(block: re.Match[str]) -> str:
        if (call := _read_call(block[1].strip())) is None:
            return block[0]
        calls.append(call)
        return ""

    content = _BLOCK.sub(take, text).strip()
    return Reply(content, tuple(calls))


def _read_call(block: str) -> ToolCall | None:
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        call = json.loads(block, strict=False)  # models leave line breaks in strings as they are
        arguments = call.get("arguments") or {}
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return ToolCall("", call["name"], arguments)
    return ToolCall("", name[1], block) if (name := _NAME.search(block)) else None
