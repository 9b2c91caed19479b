"""A policy that runs a causal language model in this process, with the requests of concurrent agents in one batch.

Simplified: a batch lasts as long as its longest reply; a serving engine would let other requests join at each token.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
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
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from k25lite.swarm.policy import Message, Reply, ToolCall
from k25lite.swarm.prefix_cache import Layers, PrefixCache, joined, length

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

    Requests that wait at the same time are one batch; those that come while it is under way are the next. If a batch
    fails, its halves are tried, and so on: only requests that fail alone fail. A conversation that goes on is not read
    again from its beginning (prefix caching), if all layers of the model attend to everything. Neither the rest of the
    batch nor what is in the cache changes a reply, beyond the last bits of the arithmetic.

    Args:
        model: is put into evaluation mode, and on `device` if one is given. Its weights must not change afterwards: what
            was computed with the old ones would be used again.
        max_new_tokens: of a reply; one that has no end by then is a refusal, as it is with an endpoint.
        max_batch: requests at once. wait: seconds that a batch which is not full waits for more.
        cache_tokens: of conversations whose keys and values are kept, on the model's device: those that were used last.
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
        cache_tokens: int = 32_768,
    ):
        if max_new_tokens < 1 or max_batch < 1 or wait < 0 or temperature < 0 or cache_tokens < 0:
            raise ValueError("max_new_tokens and max_batch are above 0; wait, temperature and cache_tokens not below")
        ends = model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
        if not self.ends:
            raise ValueError("neither the model nor the tokenizer knows a token that ends a reply")
        self.model = (model if device is None else model.to(device)).eval()
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.ends)
        self.tokenizer, self.max_new_tokens, self.max_batch, self.wait = tokenizer, max_new_tokens, max_batch, wait
        self.render, self.parse, self.temperature = render or self._render, parse or parse_calls, temperature
        self.seed = secrets.randbits(32) if seed is None else seed
        self.window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        added = tokenizer.added_tokens_decoder.items()
        self.hidden = self.ends | {token_id for token_id, token in added if token.special and str(token) not in _TAGS}
        self._asked = Counter[bytes]()
        self._known = PrefixCache(cache_tokens)
        self.reuses_prefixes = _attends_to_everything(model)
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
        cached = len(self._known)
        try:
            for request, written in zip(batch, await asyncio.to_thread(self._generate, batch), strict=True):
                if not request.written.done():
                    request.written.set_result(written)
            return
        except Exception as error:
            if len(batch) == 1 and not cached:
                if not batch[0].written.done():
                    batch[0].written.set_exception(error)
                return
        # Outside of the handler: the error would keep the memory of the batch that failed. The cache may be what memory
        # lacks, so that even a request that is alone is tried once more without it.
        await asyncio.to_thread(self._forget)
        await self._answer(batch[: len(batch) // 2])
        await self._answer(batch[len(batch) // 2 :])

    def _forget(self) -> None:
        with self._lock:
            self._known.clear()

    def _generate(self, batch: list[_Request]) -> list[list[int]]:
        """The tokens written for each request, up to the one that ends it."""
        device = self.model.device
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
            ids, mask, cache = self._padded([request.ids for request in batch], self._prefill(batch))
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=sorted(self.ends),
                pad_token_id=self.pad,
                logits_processor=[sample] if self.temperature else [],
                stopping_criteria=[is_left],
                return_dict_in_generate=True,
            )
            written = output.sequences[:, ids.shape[1] :].tolist()
            written = [row[: next((n for n, of in enumerate(row, 1) if of in self.ends), None)] for row in written]
            if self.reuses_prefixes:
                # A row that nobody waits for any more has stopped somewhere, and goes on with padding.
                lengths = [
                    0 if request.written.done() else len(row) for request, row in zip(batch, written, strict=True)
                ]
                self._keep(output.sequences, mask, lengths, output.past_key_values)
        return written

    def _prefill(self, batch: Sequence[_Request]) -> list[Layers]:
        """The keys and values of each prompt but for its last token: known, or computed in parts of similar length."""
        if not self.reuses_prefixes:
            return [[] for _ in batch]
        prompts = [request.ids[:-1] for request in batch]
        found = [self._known.find(ids) for ids in prompts]
        # With a beginning the rest needs a mask, which makes attention twice as slow: a short one is not worth it.
        found = [known if 3 * length(known) > len(ids) else [] for known, ids in zip(found, prompts, strict=True)]
        new = {row: len(ids) - length(layers) for row, (ids, layers) in enumerate(zip(prompts, found, strict=True))}
        left = sorted((row for row in new if new[row]), key=new.__getitem__)
        while left:
            part = [row for row in left if new[row] <= new[left[0]] + max(16, new[left[0]] // 8)]
            ids, mask, cache = self._padded([prompts[row] for row in part], [found[row] for row in part])
            cache = DynamicCache() if cache is None else cache
            known = cache.get_seq_length()
            with torch.no_grad():
                self.model(
                    ids[:, known:],
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, known:],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            for row, layers in zip(part, self._keep(ids, mask, [0] * len(part), cache), strict=True):
                found[row] = layers
            left = left[len(part) :]
        return found

    def _padded(
        self, prompts: Sequence[list[int]], known: Sequence[Layers]
    ) -> tuple[torch.Tensor, torch.Tensor, DynamicCache | None]:
        """Ids and mask [rows, columns], padded before what is known and before the rest; the cache of what is known."""
        device, lengths = self.model.device, list(map(length, known))
        rows = [torch.tensor(ids, device=device) for ids in prompts]
        parts = [[row[:of] for row, of in zip(rows, lengths, strict=True)]] if any(lengths) else []
        parts += [[row[of:] for row, of in zip(rows, lengths, strict=True)]]
        ids = torch.cat([pad_sequence(part, True, self.pad, "left") for part in parts], 1)
        ones = [[torch.ones_like(row) for row in part] for part in parts]
        mask = torch.cat([pad_sequence(part, True, 0, "left") for part in ones], 1)
        return ids, mask, joined(known) if any(lengths) else None

    def _keep(self, ids: torch.Tensor, mask: torch.Tensor, written: Sequence[int], cache: DynamicCache) -> list[Layers]:
        """What was computed of each row, padding left out; the last token of the longest ones never was."""
        prompt, computed, found = mask.shape[1], cache.get_seq_length(), []
        for row, count in enumerate(written):
            places = torch.cat([mask[row].nonzero()[:, 0], torch.arange(prompt, prompt + count, device=mask.device)])
            places = places[places < computed]
            layers: Layers = []
            for layer in cache.layers:  # which may lie on several devices
                own = places.to(layer.keys.device)
                layers.append((layer.keys[row, :, own], layer.values[row, :, own]))
            found.append(layers)
            self._known.keep(ids[row, places].tolist(), layers)
        return found


def _attends_to_everything(model: Any) -> bool:
    """Whether keys and values of a prefix stay true when it goes on, wherever there is padding.

    Not with layers that forget, or keep no token apart, nor where distances are counted in columns and not by position.
    """
    layers = DynamicCache(config=model.config.get_text_config()).layers
    by_position = "position_ids" in inspect.signature(model.forward).parameters
    return by_position and not hasattr(model.config, "window_size") and all(type(of) is DynamicLayer for of in layers)


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
