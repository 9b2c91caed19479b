"""Batches of the local policy: that they change no reply, that they are few, and that nothing outlives them."""

import asyncio
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from k25lite import K25Lite, K25LiteConfig
from k25lite.processing import build_tokenizer
from k25lite.swarm import Orchestrator, Reply, ScriptedPolicy, ToolCall, Trace, call
from k25lite.swarm.local import LocalPolicy, parse_calls

CHAT_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if tools -%}tools: {{ tools | map(attribute="function.name") | join(", ") }}
{% endif -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PROMPTS = ["", "a", "Whose capital is it?", "é" * 40, "2 + 2 = ?", "\n\n", "x" * 200, "why"] * 3


@contextmanager
def one_thread():
    """Matrices this small are many times slower on several threads while other processes want the processor too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token to a byte, and the marks of Qwen's chat format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<tool_call>", "</tool_call>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=CHAT_TEMPLATE
    )


TOKENIZER = byte_tokenizer()


def tiny_model(window: int = 512) -> Qwen2ForCausalLM:
    """Random, with weights large enough to say something, and ends that some of its replies come to."""
    config = Qwen2Config(
        vocab_size=len(TOKENIZER),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(range(0, 256, 16))
    return model


@one_thread()
def taught_model(turns: list[tuple[str, str]], steps: int = 120) -> Qwen2ForCausalLM:
    """A tiny model that has learned by heart what to write after each of these prompts."""
    model = tiny_model()
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = [TOKENIZER(prompt + text + "<|im_end|>", add_special_tokens=False)["input_ids"] for prompt, text in turns]
    batch = TOKENIZER.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    labels = batch["input_ids"].clone()
    for row, (prompt, _) in enumerate(turns):
        labels[row, : len(TOKENIZER(prompt, add_special_tokens=False)["input_ids"])] = -100
    labels[batch["attention_mask"] == 0] = -100
    for _ in range(steps):
        optimiser.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimiser.step()
    return model.eval()


class Counted:
    """A model that counts what it is asked, and can be told to fail."""

    def __init__(self, model, fails=lambda ids: False):
        self.model, self.fails, self.sizes = model, fails, []
        self.generation_config, self.config, self.device = model.generation_config, model.config, model.device

    def eval(self):
        return self

    def forward(self, input_ids, *, position_ids, **kwargs):
        if self.fails(input_ids):
            raise RuntimeError("out of memory")
        return self.model(input_ids, position_ids=position_ids, **kwargs)

    __call__ = forward

    def generate(self, *, input_ids, **kwargs):
        self.sizes.append(len(input_ids))
        if self.fails(input_ids):
            raise RuntimeError("out of memory")
        return self.model.generate(input_ids=input_ids, **kwargs)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def ask_all(policy, prompts) -> list:
    return await asyncio.gather(*(policy(user(prompt), []) for prompt in prompts), return_exceptions=True)


async def answer(policy, conversations) -> list[Reply]:
    return await asyncio.gather(*(policy(messages, []) for messages in conversations))


def check_against_one_by_one(model, tokenizer, prompts: list[str], tokens: int) -> None:
    """Hold the replies of a batch against what transformers writes after each prompt alone."""
    conversations = [user(prompt) for prompt in prompts]
    replies = asyncio.run(answer(LocalPolicy(model, tokenizer, max_new_tokens=tokens), conversations))
    check_replies(model, tokenizer, conversations, replies, tokens)
    assert len({reply.completion_tokens for reply in replies}) > 2  # they end at different places


def check_replies(model, tokenizer, conversations, replies: list[Reply], tokens: int) -> None:
    """Hold them against what transformers writes: each alone, without padding and from nothing."""
    ends = {tokenizer.eos_token_id, *model.generation_config.eos_token_id}
    for messages, reply in zip(conversations, replies, strict=True):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        (row,) = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
        written = row[ids.shape[1] :].tolist()
        content = tokenizer.decode([i for i in written if i not in ends], skip_special_tokens=True).strip()
        assert (reply.content, reply.prompt_tokens, reply.completion_tokens) == (content, ids.shape[1], len(written))
        assert bool(reply.refusal) == (written[-1] not in ends)


def test_a_batch_answers_as_one_by_one():
    check_against_one_by_one(tiny_model(), TOKENIZER, PROMPTS, 24)


WORDS = [f"{a}{b}" for a in "abcdef" for b in "ghijkl"]


def tiny_k25lite(moe: bool) -> tuple[K25Lite, PreTrainedTokenizerFast]:
    tokenizer = build_tokenizer(WORDS)
    torch.manual_seed(1)
    model = K25Lite(K25LiteConfig.lite(len(tokenizer), moe=moe, initializer_range=0.2)).eval()
    model.generation_config.eos_token_id = [1, 30, 31, 32]
    return model, tokenizer


@pytest.mark.parametrize("moe", [True, False])
def test_k25lite_answers_in_a_batch_as_one_by_one(moe):
    model, tokenizer = tiny_k25lite(moe)
    check_against_one_by_one(model, tokenizer, [" ".join(WORDS[:n]) for n in (1, 3, 5, 9, 14, 20, 27, 36)], 16)


@contextmanager
def tokens_read(model):
    """Counts the tokens, padding among them, that go into a model, those apart that it has just written."""
    read = []

    def count(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        read.append(ids.numel() if ids.shape[1] > 1 else 0)

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    yield read
    hook.remove()


@pytest.mark.parametrize("of", ["Qwen2", "K25Lite", "K25Lite of experts"])
def test_what_was_read_of_a_conversation_is_not_read_again(of):
    model, tokenizer = (tiny_model(4096), TOKENIZER) if of == "Qwen2" else tiny_k25lite("experts" in of)
    talks = [" ".join(WORDS[:n] * 2) for n in (2, 3, 17, 18, 30)]
    policy = LocalPolicy(model, tokenizer, max_new_tokens=12)
    conversations = [user(prompt) for prompt in talks]
    for turn in range(4):
        with tokens_read(model) as read:
            replies = asyncio.run(answer(policy, conversations))
        check_replies(model, tokenizer, conversations, replies, 12)
        with tokens_read(model) as read_anew:
            asyncio.run(answer(LocalPolicy(model, tokenizer, max_new_tokens=12, cache_tokens=0), conversations))
        share = sum(read) / sum(read_anew)
        # A question is as long as the one before it. Replies are stripped, and some cut, so that they are read again.
        assert share == 1 if turn == 0 else 0 < share < (0.8, 0.6, 0.6)[turn - 1], turn
        for messages, reply, talk in zip(conversations, replies, talks, strict=True):
            messages += [{"role": "assistant", "content": reply.content}, *user(talk)]
        if turn == 1:  # a newcomer, and one that begins as another does
            conversations += [user(WORDS[-1]), conversations[4][:3]]
            talks = [*talks, WORDS[-1], talks[4]]


def test_a_conversation_goes_on_after_one_reply_was_cancelled_and_another_failed():
    bad = TOKENIZER.encode("!", add_special_tokens=False)[0]
    model = Counted(tiny_model(), fails=lambda ids: bool((ids == bad).any()))
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=64)
    conversations = [user(text) for text in ("a", "why", "x" * 60)]
    writing, cancelled = threading.Event(), threading.Event()

    def hold(*_):
        if model.sizes:  # a batch that does not fail has its first token
            writing.set()
            cancelled.wait(60)

    model.model.register_forward_hook(hold)

    async def run():
        tasks = [asyncio.create_task(policy(messages, [])) for messages in (*conversations, user("!"))]
        await asyncio.to_thread(writing.wait, 60)
        tasks[0].cancel()
        cancelled.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    gone, *replies, failed = asyncio.run(run())
    assert isinstance(gone, asyncio.CancelledError)
    assert str(failed) == "out of memory"
    for messages, reply in zip(conversations, (Reply("b"), *replies), strict=True):
        messages += [{"role": "assistant", "content": reply.content}, *user("and?")]
    replies = asyncio.run(answer(policy, conversations))
    check_replies(model.model, TOKENIZER, conversations, replies, 64)


def test_a_request_for_which_the_cache_leaves_no_room_is_tried_once_more_without_it():
    room = {"tokens": 10_000}
    model = Counted(tiny_model(), fails=lambda ids: policy._known.tokens > room["tokens"])
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=4)
    asyncio.run(ask_all(policy, ["x" * 100]))
    room["tokens"] = 60
    (reply,) = asyncio.run(ask_all(policy, ["why"]))
    check_replies(model.model, TOKENIZER, [user("why")], [reply], 4)
    room["tokens"] = -1  # what fails without the cache, too, is not tried for ever
    (error,) = asyncio.run(ask_all(policy, ["why"]))
    assert str(error) == "out of memory"


def test_conversations_that_are_not_kept_are_read_again():
    model = tiny_model()
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=4, cache_tokens=0)
    for _ in range(2):
        with tokens_read(model) as read:
            (reply,) = asyncio.run(ask_all(policy, ["why"]))
        assert sum(read) == reply.prompt_tokens - 1


def test_a_model_without_positions_is_read_to_from_the_beginning():
    model = tiny_model()
    assert LocalPolicy(model, TOKENIZER).reuses_prefixes
    model.forward = lambda input_ids, attention_mask=None, **kwargs: None  # as MPT's: distances in columns
    assert not LocalPolicy(model, TOKENIZER).reuses_prefixes


def test_a_model_that_forgets_is_read_to_from_the_beginning():
    config = tiny_model().config
    config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 16, 0
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(range(0, 256, 16))
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=8)
    conversations = [user("x" * n) for n in (1, 40)]
    for _ in range(2):
        replies = asyncio.run(answer(policy, conversations))
        check_replies(model, TOKENIZER, conversations, replies, 8)
        conversations = [
            [*messages, {"role": "assistant", "content": reply.content}, *user("why")]
            for messages, reply in zip(conversations, replies, strict=True)
        ]


def test_concurrent_agents_share_batches():
    model = Counted(tiny_model())
    replies = asyncio.run(ask_all(LocalPolicy(model, TOKENIZER, max_new_tokens=4), ["why"] * 64))
    assert model.sizes == [64]
    assert len(set(replies)) == 1


def test_a_batch_is_no_larger_than_allowed_and_those_who_come_meanwhile_are_the_next():
    model = Counted(tiny_model())
    asyncio.run(ask_all(LocalPolicy(model, TOKENIZER, max_new_tokens=4, max_batch=5), ["why"] * 12))
    assert model.sizes == [5, 5, 2]


def test_a_full_batch_does_not_wait():
    model = Counted(tiny_model())
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=4, max_batch=2, wait=3600)

    async def two():
        first = asyncio.create_task(policy(user("a"), []))
        await asyncio.sleep(0.05)
        assert model.sizes == []  # one alone waits
        await asyncio.wait_for(asyncio.gather(first, policy(user("b"), [])), 60)
        await asyncio.wait_for(ask_all(policy, ["a", "b", "c", "d"]), 60)

    asyncio.run(two())
    assert model.sizes == [2, 2, 2]


def test_the_loop_goes_on_while_a_batch_is_under_way_and_nothing_is_left_behind():
    entered, leave = threading.Event(), threading.Event()
    model = Counted(tiny_model(), fails=lambda ids: entered.set() or not leave.wait(60))
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=4, wait=0)

    async def run():
        first = asyncio.create_task(policy(user("a"), []))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(policy(user("b"), [])) for _ in range(7)]
        await asyncio.sleep(0.01)
        leave.set()
        await asyncio.gather(first, *rest)
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(run()) == set()
    assert model.sizes == [1, 7]


def test_a_policy_outlives_its_event_loop():
    model = Counted(tiny_model())
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=4)
    assert asyncio.run(ask_all(policy, ["why"] * 3)) == asyncio.run(ask_all(policy, ["why"] * 3))
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(LocalPolicy.__call__(policy, user("why"), []), 0))
    loop = asyncio.new_event_loop()  # closed with a request under way, as a crash would
    task = loop.create_task(policy(user("why"), []))
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    asyncio.run(ask_all(policy, ["why"]))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()


def test_cancelled_requests_are_not_generated():
    model = Counted(tiny_model())
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=4, wait=0.05)

    async def run():
        tasks = [asyncio.create_task(policy(user("why"), [])) for _ in range(6)]
        await asyncio.sleep(0)
        for task in tasks[:4]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(run())
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True] * 4 + [False] * 2
    assert model.sizes == [2]


def test_a_batch_that_nobody_waits_for_any_more_stops():
    model = tiny_model(100_000)
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    model.generation_config.suppress_tokens = [TOKENIZER.eos_token_id]  # it would go on for minutes
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=90_000)

    async def run():
        await asyncio.wait_for(ask_all(policy, ["a", "b"]), 0.5)

    with pytest.raises(TimeoutError):
        asyncio.run(run())  # joins the thread


def test_cancelling_some_changes_nothing_for_the_others():
    model = tiny_model()
    (expected,) = asyncio.run(ask_all(LocalPolicy(model, TOKENIZER, max_new_tokens=64), ["x" * 200]))
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=64)

    async def run():
        tasks = [asyncio.create_task(policy(user(text), [])) for text in ("a", "x" * 200)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        return await tasks[1]

    assert asyncio.run(run()) == expected


def test_only_requests_that_fail_alone_fail():
    bad = TOKENIZER.encode("!", add_special_tokens=False)[0]
    model = Counted(tiny_model(), fails=lambda ids: bool((ids == bad).any()) or len(ids) > 16)
    prompts = [f"{'!' if n in (3, 17) else 'why'}{n}" for n in range(24)]
    results = asyncio.run(ask_all(LocalPolicy(model, TOKENIZER, max_new_tokens=4), prompts))
    assert [n for n, result in enumerate(results) if not isinstance(result, Reply)] == [3, 17]
    assert str(results[3]) == "out of memory"


def test_a_request_that_fails_after_it_was_cancelled_harms_nobody():
    entered, leave = threading.Event(), threading.Event()
    model = Counted(tiny_model(), fails=lambda ids: (entered.set(), leave.wait(60), len(model.sizes) == 1)[-1])
    policy = LocalPolicy(model, TOKENIZER, max_new_tokens=4, max_batch=1)

    async def run():
        first, second = (asyncio.create_task(policy(user("a"), [])) for _ in range(2))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        first.cancel()
        leave.set()
        return await second

    assert asyncio.run(run()).content


def test_a_prompt_beyond_the_window_fails_alone():
    # GPT-2 has a table of positions: whoever gets past its end takes the whole batch along.
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(TOKENIZER), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    policy = LocalPolicy(GPT2LMHeadModel(config), TOKENIZER, max_new_tokens=8)
    frame = len(
        TOKENIZER(TOKENIZER.apply_chat_template(user(""), add_generation_prompt=True, tokenize=False)).input_ids
    )
    fits = "a" * (64 - 8 - frame)
    results = asyncio.run(ask_all(policy, ["a", fits + "a", fits, "a" * 1000]))
    assert [type(result) for result in results] == [Reply, ValueError, Reply, ValueError]
    assert "window of 64 for 57 tokens of prompt, 8 of reply" in str(results[1])


def test_a_bad_prompt_is_told_to_its_agent_alone():
    policy = LocalPolicy(tiny_model(), TOKENIZER, max_new_tokens=4)

    async def run():
        return await asyncio.gather(
            policy(user("a"), []),
            policy([{"role": "user", "content": 3, "tool_calls": [{}]}], []),
            return_exceptions=True,
        )

    good, bad = asyncio.run(run())
    assert isinstance(good, Reply)
    assert isinstance(bad, Exception)


def test_samples_follow_the_temperature():
    model, prompts = tiny_model(), ["why"] * 400
    sampled = LocalPolicy(model, TOKENIZER, max_new_tokens=1, temperature=1.5, seed=0, max_batch=400, parse=Reply)
    text = TOKENIZER.apply_chat_template(user("why"), add_generation_prompt=True, tokenize=False)
    ids = TOKENIZER(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    probability, best = (model(ids).logits[0, -1] / 1.5).softmax(-1).max(-1)
    sampled.hidden = set()
    replies = asyncio.run(ask_all(sampled, prompts))
    share = sum(reply.content == TOKENIZER.decode([best]) for reply in replies) / 400
    assert abs(share - probability) < 4 * (probability * (1 - probability) / 400) ** 0.5
    assert 0.05 < probability < 0.95


def test_samples_depend_on_seed_and_prompt_and_on_nothing_else():
    model, prompts = tiny_model(), ["why", "a", "why", "x" * 100]

    def sample(seed, prompts, **options):
        policy = LocalPolicy(model, TOKENIZER, max_new_tokens=16, temperature=1.0, seed=seed, **options)
        return asyncio.run(ask_all(policy, prompts))

    first = sample(0, prompts)
    state = torch.get_rng_state()
    assert first[0] != first[2]  # the same prompt again is another sample
    assert sample(0, prompts, max_batch=1) == first
    assert sample(0, prompts[::-1]) == [first[3], first[0], first[1], first[2]]
    assert sample(1, prompts) != first
    assert sample(None, prompts) != sample(None, prompts)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up


def test_special_tokens_are_left_out_but_not_the_marks_of_calls():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    text = '<|im_start|>so <tool_call>{"name": "f"}</tool_call>\n<|im_end|>'
    model = Counted(tiny_model())
    model.generation_config.eos_token_id = None  # the tokenizer's alone
    said = tokenizer.encode(text, add_special_tokens=False)
    model.generate = lambda *, input_ids, past_key_values, **kwargs: SimpleNamespace(
        sequences=torch.tensor([[*row.tolist(), *said, 256, 256] for row in input_ids]), past_key_values=past_key_values
    )
    (reply,) = asyncio.run(ask_all(LocalPolicy(model, tokenizer), ["a"]))
    assert (reply.content, reply.calls) == ("so", (ToolCall("", "f", "{}"),))
    assert reply.completion_tokens == len(said)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("4", "4", []),
        ("", "", []),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>', "", [("add", '{"a": 2}')]),
        ('I add. <tool_call>{"name": "add", "arguments": {}}</tool_call>', "I add.", [("add", "{}")]),
        ('<tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>', "", [("a", "{}"), ("b", "{}")]),
        ('<tool_call>{"name": "a", "arguments": {"x": 1}}', "", [("a", '{"x": 1}')]),  # never closed
        ('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("a", '{"x": 1}')]),
        ('<tool_call>{"name": "a", "arguments": null}</tool_call>', "", [("a", "{}")]),
        ('<tool_call>{"name": "a", "arguments": {"t": "1\n2"}}</tool_call>', "", [("a", '{"t": "1\\n2"}')]),
        ('<tool_call>{"name": "a", "arguments": {"t": "é"}}</tool_call>', "", [("a", '{"t": "é"}')]),
        ('<tool_call>{"name": "a", "arguments": {x}</tool_call>', "", [("a", '{"name": "a", "arguments": {x}')]),
        ('<tool_call>[{"name": "a"}]</tool_call>', "", [("a", '[{"name": "a"}]')]),
        ("<tool_call>add 2</tool_call>", "<tool_call>add 2</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ("<tool_call></tool_call>", "<tool_call></tool_call>", []),
        ("<tool_call>" + "[" * 100_000, "<tool_call>" + "[" * 100_000, []),
        ("</tool_call> 4", "</tool_call> 4", []),
    ],
)
def test_parsing(text, content, calls):
    reply = parse_calls(text)
    assert reply.content == content
    assert [(call.name, call.arguments) for call in reply.calls] == calls


def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


def conversations(sums: list[tuple[int, int]]) -> list[tuple[str, str]]:
    """Prompts as the chat template makes them, and what to write: a call of `add`, and the sum after it."""
    turns = []
    for a, b in sums:
        asked = f"<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n{a} + {b}<|im_end|>\n"
        called = f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'
        told = f"<|im_start|>assistant\n{called}<|im_end|>\n<|im_start|>tool\n{a + b}<|im_end|>\n"
        start = "tools: add\n<|im_start|>assistant\n"
        turns += [(asked + start, called), (asked + told + start, str(a + b))]
    return turns


def test_sixteen_sub_agents_call_tools_on_one_model():
    sums = [(2, 3), (40, 2), (7, 70), (5, 5)]
    model = Counted(taught_model(conversations(sums)))
    assigned = [call("assign_task", agent="adder", prompt=f"{a} + {b}") for a, b in sums * 4]
    created = call("create_subagent", name="adder", system_prompt="Add.")
    script = ScriptedPolicy([Reply(calls=(created,)), Reply(calls=tuple(assigned)), "done"])
    lead = Orchestrator(script, sub_policy=LocalPolicy(model, TOKENIZER, max_new_tokens=64), sub_tools=[add])
    trace = Trace()
    assert lead.run_sync("Add them all.", trace).answer == "done"
    results = [event for event in trace.events if event["event"] == "result"]
    assert sorted(event["answer"] for event in results) == sorted(str(a + b) for a, b in sums * 4)
    assert sum(model.sizes) == 32
    assert len(model.sizes) < 16
