"""Text, images and videos in, model inputs out: a word-level tokenizer, and the processor that places the vision tokens.

Source: Kimi K2.5 report, section 4.2: a chunk of up to four frames costs the tokens of one image, and a video stands in a
prompt as its chunks, each behind its timestamp. Simplified here: the tokenizer knows a closed vocabulary of words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from k25lite.model import K25LiteConfig
from k25lite.vision import MoonViT3DConfig, VideoChunk, pack, read_image, read_video
from k25lite.vision.media import MAX_TOKENS

IMAGE, VIDEO, MEDIA = "<image>", "<video>", "<media>"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", MEDIA, IMAGE, VIDEO, "<user>", "<assistant>", "<system>")
THINK_TOKENS = (
    "<think>",
    "</think>",
)  # not special: what stands between them is part of the decoded answer, and so are they
TIMESTAMP_TOKENS = tuple("0123456789:.")

Picture = Image.Image | np.ndarray | str | PathLike
Video = np.ndarray | Sequence[VideoChunk] | str | PathLike

# "<user> what ? <assistant> red <eos>"; a part of a message is a text, or the mark of an image or a video.
CHAT_TEMPLATE = """
{%- macro render(content) -%}
  {%- if content is string -%}
    {{ content }}
  {%- else -%}
    {%- for part in content -%}
      {%- if not loop.first %}{{ ' ' }}{% endif -%}
      {%- if part['type'] == 'text' -%}
        {{ part['text'] }}
      {%- elif part['type'] in ('image', 'video') -%}
        {{ '<' + part['type'] + '>' }}
      {%- else -%}
        {{ raise_exception('a part of a message is a text, an image or a video, not: ' + part['type']) }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if not loop.first %}{{ ' ' }}{% endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{ '<assistant> ' }}
    {%- generation -%}
      {{ render(message['content']) + ' <eos>' }}
    {%- endgeneration -%}
  {%- elif message['role'] in ('user', 'system') -%}
    {{ '<' + message['role'] + '> ' + render(message['content']) }}
  {%- else -%}
    {{ raise_exception('a role is user, assistant or system, not: ' + message['role']) }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ ' <assistant>' }}{% endif -%}
"""


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: ids 0 to 10 are the special tokens, then what timestamps need, then `words` as they come.

    Lowercase words are one token and may hold one hyphen ("red-disc"); each digit, uppercase letter and other sign is a
    token of its own, and so is a newline if it is among the words. Other white space separates and is forgotten; an unknown
    token becomes <unk>. Decoding writes one space between tokens, none beside a newline and none inside a run of digits and
    uppercase letters, so "read : K7QZ" comes back as it was. Batches are padded on the left.

    Raises:
        ValueError: a word that this tokenizer would take apart, and therefore never produce.
    """
    words = list(words)
    vocabulary = dict.fromkeys([*SPECIAL_TOKENS, *THINK_TOKENS, *TIMESTAMP_TOKENS, *words])
    newline = r"\n|" if "\n" in vocabulary else ""
    split = pre_tokenizers.Split(Regex(newline + r"[a-z]+(?:-[a-z]+)?|\S"), "removed", invert=True)
    for word in words:
        if [piece for piece, _ in split.pre_tokenize_str(word)] != [word] and word not in SPECIAL_TOKENS + THINK_TOKENS:
            raise ValueError(f"{word!r} is not one token: a lowercase word with at most one hyphen, or one sign")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),  # no token starts with the prefix: a space before each
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=[A-Z0-9]) (?=[A-Z0-9])| (?=\n)|(?<=\n) "), ""),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in THINK_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )


class K25LiteProcessor(ProcessorMixin):
    """Texts with <image> and <video> marks, and the media they mark, as inputs of `K25Lite`.

    Example:
        >>> processor = K25LiteProcessor(build_tokenizer(["what", "moves"]))
        >>> inputs = processor(text="<video> what moves", videos=[np.zeros((6, 16, 32, 3), np.uint8)])
        >>> inputs["grid_thw"].tolist()  # six frames are a chunk of four and one of two: two tokens each
        [[4, 2, 4], [2, 2, 4]]

    Args:
        tokenizer: must know <media>, and what timestamps are made of if it is to read videos.
        patch_size, merge_size, frames_per_chunk: the encoder's patch_size, merge_kernel_size and pos_emb_time.
        max_tokens: vision tokens one image or chunk may cost; larger ones are shrunk.
        chat_template: by default the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        patch_size: int = 8,
        merge_size: int = 2,
        frames_per_chunk: int = 4,
        max_tokens: int = MAX_TOKENS,
        chat_template: str | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.patch_size, self.merge_size = patch_size, merge_size
        self.frames_per_chunk, self.max_tokens = frames_per_chunk, max_tokens
        self.media_token_id = tokenizer.convert_tokens_to_ids(MEDIA)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values", "grid_thw"]

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        *,
        fps: float = 2.0,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        return_text_replacement_offsets: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs for `K25Lite.forward` and `generate`.

        An <image> becomes its h * w / 4 media tokens; a <video>, for each chunk, its timestamp and as many media tokens.

        Args:
            text: one text or several.
            images: in the order of their marks: pillow images, [height, width, 3] uint8, or paths; lists are joined.
            videos: in the order of their marks: paths, lists of `VideoChunk`, or [frames, height, width, 3] uint8; lists
                of these are joined.
            fps: frames taken per second of a video file; of an array, the frames per second that it holds.
            padding, kwargs: the tokenizer's.

        Returns:
            input_ids, attention_mask [texts, length], and with media pixel_values [patches, 3, p, p] float32 and
            grid_thw [items, 3], in the order in which the media stand in the texts.

        Raises:
            ValueError: marks and media differ in number, an item that is no picture or video, or truncated media.
        """
        texts = [text] if isinstance(text, str) else list(text)
        pictures, clips = list(_flat_images(images)), list(_flat_videos(videos))
        for mark, given in ((IMAGE, pictures), (VIDEO, clips)):
            if (marks := sum(t.count(mark) for t in texts)) != len(given):
                raise ValueError(f"the texts hold {marks} {mark} marks for {len(given)} {mark[1:-1]}s")
        queues = {IMAGE: iter(pictures), VIDEO: iter(clips)}
        media = [
            self._items(mark, next(queues[mark]), fps) for t in texts for mark in re.findall(f"{IMAGE}|{VIDEO}", t)
        ]
        vision, sizes = {}, []
        if items := [item for chunks in media for item in chunks]:
            pixel_values, grid_thw = pack(items, self._vision_config, self.max_tokens)
            vision = {"pixel_values": pixel_values, "grid_thw": grid_thw}
            sizes = (grid_thw[:, 1:].prod(1) // self.merge_size**2).tolist()
        places = iter(_places(media, sizes))
        expanded, offsets = zip(*(_expand(t, places) for t in texts), strict=True) if texts else ((), ())
        inputs = self.tokenizer(list(expanded), padding=padding, **kwargs)
        kept = sum(ids.count(self.media_token_id) for ids in inputs["input_ids"])
        if kept != sum(sizes):
            raise ValueError(f"{kept} media tokens stand in the tokenized text for {sum(sizes)} vision tokens")
        if return_text_replacement_offsets:
            inputs["text_replacement_offsets"] = list(offsets)
        return BatchFeature(
            {**inputs, **vision}, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion
        )

    @property
    def _vision_config(self) -> MoonViT3DConfig:
        """What `pack` needs to know of the encoder."""
        return MoonViT3DConfig(
            patch_size=self.patch_size,
            merge_kernel_size=(self.merge_size, self.merge_size),
            pos_emb_time=self.frames_per_chunk,
        )

    def _items(self, mark: str, medium: Any, fps: float) -> Sequence[np.ndarray | Image.Image | VideoChunk]:
        """What the encoder sees of one image (one item) or one video (its chunks)."""
        if mark == IMAGE:
            return [read_image(medium) if isinstance(medium, str | PathLike) else medium]
        if isinstance(medium, np.ndarray):
            if medium.ndim != 4:
                raise ValueError(f"a video must be [frames, height, width, 3] uint8, got {list(medium.shape)}")
            length = self.frames_per_chunk
            starts = range(0, len(medium), length)
            frames = [medium[start : start + length] for start in starts]
            chunks = [
                VideoChunk(part, tuple((start + i) / fps for i in range(len(part))))
                for start, part in zip(starts, frames, strict=True)
            ]
        elif isinstance(medium, str | PathLike):
            unit = self.patch_size * self.merge_size
            chunks = read_video(
                medium, fps, frames_per_chunk=self.frames_per_chunk, unit=unit, max_tokens=self.max_tokens
            )
        else:
            chunks = list(medium)
        if not chunks:
            raise ValueError("a video holds no frame")
        return chunks


def _flat_images(images: Any) -> Iterator[Picture]:
    if isinstance(images, list | tuple):
        for image in images:
            yield from _flat_images(image)
    elif images is not None:
        yield images


def _flat_videos(videos: Any) -> Iterator[Video]:
    """Videos out of lists of videos; a list that starts with a `VideoChunk` is itself a video."""
    if isinstance(videos, list | tuple) and not (videos and isinstance(videos[0], VideoChunk)):
        for video in videos:
            yield from _flat_videos(video)
    elif videos is not None:
        yield videos


def _places(media: list[Sequence], sizes: list[int]) -> Iterator[str]:
    """The text that takes the place of each mark; `sizes` are the vision tokens of each item."""
    left = iter(sizes)
    for items in media:
        stamps = [f"{item.timestamp} " if isinstance(item, VideoChunk) else "" for item in items]
        yield " ".join(stamp + MEDIA * next(left) for stamp in stamps)


def _expand(text: str, places: Iterator[str]) -> tuple[str, list[dict[str, tuple[int, int]]]]:
    """The text with its marks replaced, and for each where it stood and where its replacement stands, in characters."""
    expanded, offsets, end = "", [], 0
    for mark in re.finditer(f"{IMAGE}|{VIDEO}", text):
        expanded += text[end : mark.start()]
        place = next(places)
        offsets.append({"span": mark.span(), "new_span": (len(expanded), len(expanded) + len(place))})
        expanded, end = expanded + place, mark.end()
    return expanded + text[end:], offsets


AutoProcessor.register(K25LiteConfig, K25LiteProcessor)
