"""The tokenizer's round trip, and where the processor puts media tokens, timestamps and patches."""

import json

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from k25lite import K25Lite, K25LiteConfig, K25LiteProcessor, MoonViT3DConfig
from k25lite.processing import SPECIAL_TOKENS, THINK_TOKENS, build_tokenizer
from k25lite.vision import MediaError, VideoChunk, pack

WORDS = "read the what moves red blue red-disc blue-ring max min disc ring".split()
SIGNS = [*"+-*=()[],?;_#'\"/<>", "—", "é"]
LETTERS = list("ABKQZ")
DIGITS = list("0123456789")
TOKENIZER = build_tokenizer([*WORDS, *SIGNS, *LETTERS, "\n"])
PROCESSOR = K25LiteProcessor(TOKENIZER, max_tokens=64)


def flat(height: int, width: int, shade: int) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


def clip(frames: int, height: int = 16, width: int = 32, shade: int = 0) -> np.ndarray:
    return np.stack([flat(height, width, shade + i) for i in range(frames)])


def shades(inputs) -> list[float]:
    """The mean shade of each item, 0 to 255: which of the flat pictures it is."""
    parts = inputs["pixel_values"].split(inputs["grid_thw"].prod(1).tolist())
    return [round((part.mean().item() + 1) * 127.5, 2) for part in parts]


pieces = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(SIGNS),
    st.sampled_from([*SPECIAL_TOKENS, *THINK_TOKENS]),
    st.text(st.sampled_from(LETTERS + DIGITS), min_size=1, max_size=5),
)


@st.composite
def texts(draw) -> str:
    """What the world writes: words, signs and numbers with one space between, never two numbers or codes side by side."""
    lines = draw(st.lists(st.lists(pieces, max_size=8), min_size=1, max_size=3))
    for line in lines:
        for i in range(len(line) - 1, 0, -1):
            if line[i][0] in LETTERS + DIGITS and line[i - 1][-1] in LETTERS + DIGITS:
                line.insert(i, ",")
    return "\n".join(" ".join(line) for line in lines)


@given(texts())
def test_text_comes_back_as_it_was_written(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert text.count("<unk>") == ids.count(TOKENIZER.unk_token_id)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("read : K7QZ", ["read", ":", "K", "7", "Q", "Z"]),
        ("17 + 25 = 42", ["1", "7", "+", "2", "5", "=", "4", "2"]),
        ("max ( [ 3 , 7 ] )", ["max", "(", "[", "3", ",", "7", "]", ")"]),
        ("max([3,7])", ["max", "(", "[", "3", ",", "7", "]", ")"]),
        ("red-disc  -\tdisc", ["red-disc", "-", "disc"]),
        ("<user> what ?<assistant>red<eos>", ["<user>", "what", "?", "<assistant>", "red", "<eos>"]),
        ("what\n\nmoves", ["what", "\n", "\n", "moves"]),
        ("unheard of", ["<unk>", "<unk>"]),
    ],
)
def test_tokens(text, tokens):
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"]) == tokens


def test_the_ids_that_the_configuration_counts_on():
    config = K25LiteConfig.lite(len(TOKENIZER))
    names = ["<pad>", "<eos>", "<media>"]
    text = config.text_config
    assert TOKENIZER.convert_tokens_to_ids(names) == [text.pad_token_id, text.eos_token_id, config.media_token_id]
    assert [TOKENIZER.pad_token_id, TOKENIZER.eos_token_id] == [text.pad_token_id, text.eos_token_id]


def test_special_tokens_are_left_out_of_an_answer_and_thoughts_are_not():
    ids = TOKENIZER("<assistant> <think> 7 + 1 </think> 8 <eos> <pad>")["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<think> 7 + 1 </think> 8"


@pytest.mark.parametrize("word", ["Red", "two words", "a-b-c", "x1", "12", ""])
def test_a_word_that_could_never_be_one_token(word):
    with pytest.raises(ValueError, match="is not one token"):
        build_tokenizer(["red", word])


def test_without_a_newline_among_the_words_it_is_white_space():
    tokenizer = build_tokenizer(["what"])
    assert tokenizer.decode(tokenizer("what\nwhat")["input_ids"]) == "what what"


@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_a_chunk_becomes_its_timestamp_and_as_many_media_tokens_as_an_image(t):
    chunk = VideoChunk(clip(t, 32, 48), tuple(3725.5 + i for i in range(t)))
    inputs = PROCESSOR(text="<video> what", videos=[[chunk]])
    assert inputs["grid_thw"].tolist() == [[t, 4, 6]]
    assert TOKENIZER.decode(inputs["input_ids"][0]) == "01 : 02 : 05 . 500 " + "<media> " * 6 + "what"


def test_an_array_is_cut_into_chunks_of_four_frames_each_behind_its_time():
    inputs = PROCESSOR(text="<video>", videos=clip(10, 16, 16), fps=2.0)
    assert inputs["grid_thw"].tolist() == [[4, 2, 2], [4, 2, 2], [2, 2, 2]]
    stamps = "00 : 00 : 00 . 000 <media> 00 : 00 : 02 . 000 <media> 00 : 00 : 04 . 000 <media>"
    assert TOKENIZER.decode(inputs["input_ids"][0]) == stamps


def test_media_are_packed_in_the_order_of_the_texts():
    """Images and videos come in two lists, but stand in the texts, and in the packed sequence, one among the other."""
    inputs = PROCESSOR(
        text=["<image> and <video> and <image>", "what moves", "<video> <image>"],
        images=[flat(16, 16, 10), flat(32, 16, 20), flat(16, 48, 30)],
        videos=[clip(6, shade=100), clip(1, shade=200)],
    )
    assert inputs["grid_thw"].tolist() == [[1, 2, 2], [4, 2, 4], [2, 2, 4], [1, 4, 2], [1, 2, 4], [1, 2, 6]]
    assert shades(inputs) == [10, 101.5, 104.5, 20, 200, 30]
    counts = (inputs["input_ids"] == PROCESSOR.media_token_id).sum(1).tolist()
    assert counts == [1 + 2 + 2 + 2, 0, 2 + 3]
    assert inputs["attention_mask"][1].tolist() == [0] * (inputs["input_ids"].shape[1] - 2) + [1, 1]


def test_patches_are_those_of_pack():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    inputs = PROCESSOR(text="<image>", images=[image])
    pixel_values, grid_thw = pack([image], MoonViT3DConfig.lite(), max_tokens=64)
    assert torch.equal(inputs["pixel_values"], pixel_values)
    assert torch.equal(inputs["grid_thw"], grid_thw)


def test_a_large_picture_is_shrunk_to_the_budget():
    inputs = PROCESSOR(text="<image>", images=Image.new("RGB", (640, 640)))
    assert inputs["grid_thw"].tolist() == [[1, 16, 16]]
    assert (inputs["input_ids"] == PROCESSOR.media_token_id).sum() == 64


def test_files(tmp_path):
    Image.fromarray(flat(16, 32, 77)).save(tmp_path / "picture.png")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 32
        for frame in clip(30, 32, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    inputs = PROCESSOR(
        text="<image> <video>", images=tmp_path / "picture.png", videos=str(tmp_path / "clip.mp4"), fps=2
    )
    assert inputs["grid_thw"].tolist() == [[1, 2, 4], [4, 4, 8], [2, 4, 8]]
    assert "00 : 00 : 02 . 000 <media>" in TOKENIZER.decode(inputs["input_ids"][0])
    with pytest.raises(MediaError, match=r"nothing\.png: no such file"):
        PROCESSOR(text="<image>", images=[tmp_path / "nothing.png"])


@pytest.mark.parametrize(
    ("text", "images", "videos", "message"),
    [
        ("<image> <image>", [flat(16, 16, 0)], None, "2 <image> marks for 1 images"),
        ("what", [flat(16, 16, 0)], None, "0 <image> marks for 1 images"),
        (["<video>", "<video>"], None, None, "2 <video> marks for 0 videos"),
        ("<image>", None, [clip(2)], "1 <image> marks for 0 images"),
        ("<video>", None, [np.zeros((0, 16, 16, 3), np.uint8)], "a video holds no frame"),
        ("<video>", None, [flat(16, 16, 0)], r"a video must be \[frames, height, width, 3\] uint8, got \[16, 16, 3\]"),
        ("<image>", [np.zeros((16, 16), np.uint8)], None, r"items\[0\] must be .* got uint8 \(16, 16\)"),
        ("<media> <image>", [flat(16, 16, 0)], None, "2 media tokens stand in the tokenized text for 1 vision tokens"),
    ],
)
def test_marks_and_media_that_do_not_match(text, images, videos, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR(text=text, images=images, videos=videos)


def test_media_tokens_are_not_truncated_in_silence():
    with pytest.raises(ValueError, match="3 media tokens stand in the tokenized text for 4 vision tokens"):
        PROCESSOR(text="<image> what", images=[flat(32, 32, 0)], truncation=True, max_length=3)


CONVERSATION = [
    {"role": "system", "content": "read the disc"},
    {
        "role": "user",
        "content": [
            {"type": "video", "video": clip(5, shade=50)},
            {"type": "text", "text": "what moves ?"},
            {"type": "image", "image": flat(32, 16, 9)},
        ],
    },
    {"role": "assistant", "content": "red-disc"},
    {"role": "user", "content": "what ?"},
]
PROMPT = "<system> read the disc <user> <video> what moves ? <image> <assistant> red-disc <eos> <user> what ?"


def test_chat_template():
    assert TOKENIZER.apply_chat_template(CONVERSATION, tokenize=False) == PROMPT
    assert PROCESSOR.apply_chat_template(CONVERSATION) == PROMPT
    assert PROCESSOR.apply_chat_template(CONVERSATION, add_generation_prompt=True) == PROMPT + " <assistant>"


def test_a_conversation_becomes_model_inputs_in_one_call():
    expected = PROCESSOR(text=PROMPT + " <assistant>", images=flat(32, 16, 9), videos=clip(5, shade=50))
    inputs = PROCESSOR.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    batch = PROCESSOR.apply_chat_template([CONVERSATION[:1], CONVERSATION], tokenize=True, return_dict=True)
    assert batch["input_ids"].shape[0] == 2
    assert shades(batch) == [51.5, 54, 9]


def test_the_assistant_mask_covers_the_answers_and_their_end():
    inputs = PROCESSOR.apply_chat_template(
        [CONVERSATION, CONVERSATION[:1]], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = inputs["input_ids"][torch.tensor(inputs["assistant_masks"]).bool()]
    assert TOKENIZER.decode(masked) == "red-disc <eos>"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "tool", "content": "7"}, "not: tool"),
        ({"role": "user", "content": [{"type": "audio"}]}, "not: audio"),
    ],
)
def test_a_message_that_the_template_cannot_write(message, error):
    with pytest.raises(Exception, match=error):
        TOKENIZER.apply_chat_template([message], tokenize=False)


def test_saved_and_loaded(tmp_path):
    model = K25Lite(K25LiteConfig.lite(len(TOKENIZER), moe=False))
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    expected = PROCESSOR(text=PROMPT, images=flat(32, 16, 9), videos=clip(5))
    for loader in (K25LiteProcessor, AutoProcessor):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, K25LiteProcessor)
        assert json.loads(loaded.to_json_string()) == json.loads(PROCESSOR.to_json_string())
        inputs = loaded(text=PROMPT, images=flat(32, 16, 9), videos=clip(5))
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert loaded.apply_chat_template(CONVERSATION) == PROMPT
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("read : K7QZ\nmax ( 3 )")["input_ids"]) == "read : K7QZ\nmax ( 3 )"
    assert tokenizer.padding_side == "left"


def test_processor_and_model_together():
    torch.manual_seed(0)
    model = K25Lite(K25LiteConfig.lite(len(TOKENIZER))).eval()
    inputs = PROCESSOR(text=["<video> what moves ?", "<image> read"], images=flat(32, 16, 9), videos=clip(5))
    answers = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answers.shape[0] == 2
    assert all(isinstance(text, str) for text in PROCESSOR.batch_decode(answers, skip_special_tokens=True))
