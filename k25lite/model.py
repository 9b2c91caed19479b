"""K25Lite: MoonViT-3D -> projector -> any causal language model of transformers, as one model to train and to generate.

Source: Kimi K2.5 report, section 4.2; the lite language model is a small DeepSeek-V3, the class of Kimi K2 (multi-head
latent attention, mixture of experts). Not covered: multi-token prediction, and prefilling a prompt with pictures in parts.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.configuration_utils import SubConfigSpec
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from k25lite.vision import MoonViT3D, MoonViT3DConfig, Projector
from k25lite.vision.checkpoint import check_fit


def lite_text_config(vocab_size: int, moe: bool = False, **changes: Any) -> DeepseekV3Config:
    """A small DeepSeek-V3; `changes` are fields of `DeepseekV3Config`.

    Dense by default: on a CPU it trains a fifth faster than experts with as many active parameters, which notebook 02 does
    not establish to be better. With `moe`, every layer but the first is a mixture of 8 routed experts, 2 active, and one
    that all tokens share. Experts are sized, and routed ones scaled, so that a token meets as many parameters, and at
    initialisation as strong a layer, as in the dense model.
    """
    small = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    } | changes
    active = small["num_experts_per_tok"] + small["n_shared_experts"]
    derived = {
        "num_key_value_heads": small["num_attention_heads"],
        "moe_intermediate_size": round(small["intermediate_size"] / active),
        "routed_scaling_factor": float(
            small["num_experts_per_tok"]
        ),  # their normalised weights then sum to their number
        "first_k_dense_replace": 1 if moe else small["num_hidden_layers"],
    }
    return DeepseekV3Config(vocab_size=vocab_size, **derived | small)


@strict
class K25LiteConfig(PreTrainedConfig):
    """The encoder's configuration, the language model's, and which token stands for a vision token.

    Args:
        vision_config: a `MoonViT3DConfig`, or its fields; by default the lite one.
        text_config: that of any causal language model, or its fields with a `model_type`; by default the lite one.
        media_token_id: the placeholder in `input_ids`, one for each vision token.
    """

    model_type = "k25lite"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": MoonViT3DConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="deepseek_v3"),
    }

    vision_config: Any = None
    text_config: Any = None
    media_token_id: int = 3

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = self.vision_config or MoonViT3DConfig.lite()
        self.text_config = self.text_config or lite_text_config(512)
        super().__post_init__(**kwargs)
        vocabulary = self.text_config.vocab_size
        if not 0 <= self.media_token_id < vocabulary:
            raise ValueError(f"media_token_id {self.media_token_id} is outside the vocabulary of {vocabulary} tokens")

    @classmethod
    def lite(
        cls,
        vocab_size: int,
        *,
        moe: bool = False,
        media_token_id: int = 3,
        vision_config: MoonViT3DConfig | None = None,
        **changes: Any,
    ) -> K25LiteConfig:
        """The model of the notebooks: 0.9M parameters of encoder, a language model of 4 layers of width 128.

        Args:
            vocab_size: of the tokenizer; ids 0, 1 and 3 are padding, end and media, as `build_tokenizer` numbers them.
            moe: a mixture of experts with the active parameters of the dense model.
            changes: fields of the language model's `DeepseekV3Config`, such as `initializer_range`.
        """
        text = lite_text_config(vocab_size, moe, **changes)
        return cls(vision_config=vision_config, text_config=text, media_token_id=media_token_id)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> K25LiteConfig:
        """As in transformers, but another model's configuration is an error, not a default model under its name."""
        if (model_type := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"this is the configuration of a {model_type!r} model, not of a {cls.model_type!r} one")
        return super().from_dict(config_dict, **kwargs)


class K25Lite(PreTrainedModel, GenerationMixin):
    """A language model that sees: vision tokens take the places of the media tokens in the text.

    Example:
        >>> model = K25Lite(K25LiteConfig.lite(vocab_size=100))
        >>> ids = torch.tensor([[3, 3, 20, 21]])  # two media tokens: a picture of 16 x 32 pixels, or a chunk of such frames
        >>> model(ids, torch.randn(8, 3, 8, 8), torch.tensor([[1, 2, 4]])).logits.shape
        torch.Size([1, 4, 100])
    """

    config_class = K25LiteConfig
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: K25LiteConfig):
        super().__init__(config)
        # Named as in transformers' Kimi K2.5: `MoonViT3D.from_pretrained` and `Projector.from_pretrained` read this too.
        self.vision_tower = MoonViT3D(config.vision_config)
        self.mm_projector = Projector(
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            merge=config.vision_config.merge_kernel_size[0],
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.generation_config.suppress_tokens = [config.media_token_id]  # it may read placeholders, not write them
        self.post_init()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def encode_vision(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """[patches, 3, p, p], [items, 3] -> [vision tokens, text hidden], h * w / 4 tokens per item, items in order.

        Raises:
            ValueError: the grids do not describe these patches.
        """
        return self.mm_projector(self.vision_tower(pixel_values, grid_thw).pooler_output)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next tokens, and with `labels` the loss.

        Documents packed into one row are kept apart by `position_ids` that start at 0 in each, without an attention mask.

        Args:
            input_ids: [rows, length], with one media token for each vision token.
            pixel_values: [patches, 3, p, p], the images and chunks in the order of their placeholders, row after row.
            grid_thw: [items, 3] integers, (frames, rows, columns) in patches.
            vision_embeds: [vision tokens, text hidden] from `encode_vision`, instead of pixels.
            attention_mask: [rows, length], 0 at padding. position_ids: [rows, length].
            past_key_values: the cache of the tokens before these.
            labels: [rows, length], the tokens themselves, -100 where none is asked for, as at the start of a document.
            use_cache: by default only if a cache is given: one of its own would join packed documents, and slow training.
            kwargs: what else the language model takes (`logits_to_keep`, `output_router_logits`, ...).

        Returns:
            The language model's output: `loss`, `logits` [rows, length, vocabulary], `past_key_values`, ...

        Raises:
            ValueError: placeholders and vision tokens differ in number; pixels without grids, or with `vision_embeds`.
        """
        vision_embeds = self._vision(pixel_values, grid_thw, vision_embeds)
        embeds = self.get_input_embeddings()(input_ids)
        if vision_embeds is not None:
            places = (input_ids.flatten() == self.config.media_token_id).nonzero().squeeze(1)
            check_count(len(places), len(vision_embeds))
            embeds = embeds.flatten(0, 1).index_copy(0, places, vision_embeds.to(embeds.dtype)).view_as(embeds)
        elif past_key_values is None or not past_key_values.get_seq_length():
            check_count(int((input_ids == self.config.media_token_id).sum()), 0)
        return self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=past_key_values is not None if use_cache is None else use_cache,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of one step. With a cache, vision tokens belong to the first one; without, to each."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("vision_embeds", None)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Encode the vision, once for all samples, beams and steps, and repeat it with the rows it belongs to."""
        given = (model_kwargs.pop(name, None) for name in ("pixel_values", "grid_thw", "vision_embeds"))
        vision_embeds = self._vision(*given)
        if vision_embeds is not None and expand_size > 1:
            counts = (input_ids == self.config.media_token_id).sum(1).tolist()
            check_count(sum(counts), len(vision_embeds))
            vision_embeds = torch.cat([part.repeat(expand_size, 1) for part in vision_embeds.split(counts)])
        rows, others = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        return rows, others if vision_embeds is None else others | {"vision_embeds": vision_embeds}

    def _vision(
        self, pixel_values: torch.Tensor | None, grid_thw: torch.Tensor | None, vision_embeds: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The vision tokens, if there are any, from pixels or as they are given."""
        if (pixel_values is None) != (grid_thw is None):
            raise ValueError("pixel_values and grid_thw come together")
        if pixel_values is None or grid_thw is None:
            return vision_embeds
        if vision_embeds is not None:
            raise ValueError("give pixel_values or vision_embeds, not both")
        return self.encode_vision(pixel_values, grid_thw)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | PathLike, *args: Any, **kwargs: Any) -> K25Lite:
        """As in transformers, but a checkpoint that does not fit its configuration is an error, not a warning.

        Raises:
            OSError: no checkpoint there. ValueError: another model's, or tensors missing, too many, or of other shapes.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = super().from_pretrained(path_or_hub_id, *args, **kwargs | options)
        check_fit(path_or_hub_id, info)
        return (model, info) if wants_info else model  # type: ignore[return-value]


def check_count(placeholders: int, vision_tokens: int) -> None:
    """Raise unless the text has a place for every vision token, and no more."""
    if placeholders != vision_tokens:
        raise ValueError(f"the text holds {placeholders} media tokens for {vision_tokens} vision tokens")


AutoConfig.register("k25lite", K25LiteConfig)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(K25LiteConfig, K25Lite)
