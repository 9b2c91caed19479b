"""K25Lite against transformers' Kimi K2.5, and against itself: packed, padded, cached, expanded, saved."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig
from transformers.models.kimi_k25 import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from k25lite import K25Lite, K25LiteConfig, MoonViT3D, MoonViT3DConfig
from k25lite.model import lite_text_config
from k25lite.vision import Projector
from k25lite.vision.checkpoint import to_transformers

VOCABULARY, MEDIA, PAD = 60, 3, 0
LOUD = 0.15  # initial weights large enough that a token out of place shows in the logits

Document = tuple[list[int], list[list[int]]]  # token ids, and the grids of what their placeholders stand for
TEXT: Document = ([20, 31, 42, 23], [])
IMAGE: Document = ([24, *[MEDIA] * 2, 25, 26], [[1, 2, 4]])
VIDEO: Document = ([*[MEDIA] * 4, 27, *[MEDIA] * 4, 28, 29, 30], [[4, 4, 4], [3, 4, 4]])
BOTH: Document = ([33, MEDIA, 34, *[MEDIA] * 6], [[2, 2, 2], [1, 6, 4]])
DOCUMENTS = [IMAGE, TEXT, VIDEO, BOTH]


def make_model(kind: str) -> K25Lite:
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": 1}
        text_config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=LOUD, **sizes, **ids)
    else:
        text_config = lite_text_config(VOCABULARY, kind == "moe", initializer_range=LOUD)
    vision_config = MoonViT3DConfig.lite(num_hidden_layers=2)
    return K25Lite(K25LiteConfig(vision_config=vision_config, text_config=text_config, media_token_id=MEDIA)).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, K25Lite]:
    return {kind: make_model(kind) for kind in ("moe", "dense", "llama")}


@pytest.fixture(params=["moe", "dense", "llama"])
def model(request, models) -> K25Lite:
    return models[request.param]


def pixels(document: Document, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the encoder sees of a document; the same numbers whether it stands alone or in a batch."""
    if not document[1]:
        return {}
    grid_thw = torch.tensor(document[1])
    generator = torch.Generator().manual_seed(seed + len(document[0]))
    count = int(grid_thw.prod(1).sum())
    return {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator), "grid_thw": grid_thw}


def together(documents: list[Document]) -> dict[str, torch.Tensor]:
    seen = [pixels(document) for document in documents if document[1]]
    return {name: torch.cat([part[name] for part in seen]) for name in ("pixel_values", "grid_thw")} if seen else {}


def alone(document: Document) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([document[0]]), **pixels(document)}


def padded(documents: list[Document]) -> dict[str, torch.Tensor]:
    """One row per document, padded on the left."""
    length = max(len(ids) for ids, _ in documents)
    rows = torch.tensor([[PAD] * (length - len(ids)) + ids for ids, _ in documents])
    return {"input_ids": rows, "attention_mask": (rows != PAD).long(), **together(documents)}


@torch.no_grad()
def test_equals_transformers_on_images():
    """Their full model with our weights; it cannot do chunks of several frames, which the invariants below cover."""
    model = make_model("moe")
    vision, text = model.config.vision_config, model.config.text_config
    config = Kimi_K25Config(
        vision_config={k: v for k, v in vision.to_dict().items() if "temporal" not in k and "space" not in k},
        text_config=text.to_dict(),
        projection_hidden_size=vision.hidden_size,
        image_token_id=MEDIA,
        video_token_id=VOCABULARY,
        tie_word_embeddings=True,
    )
    theirs = Kimi_K25ForConditionalGeneration(config).eval()
    state = {f"model.vision_tower.{k}": v for k, v in to_transformers(model.vision_tower.state_dict(), 4).items()}
    state |= {f"model.mm_projector.{k}": v for k, v in model.mm_projector.state_dict().items()}
    for name, tensor in model.language_model.state_dict().items():
        state[name.replace("model.", "model.language_model.", 1)] = tensor
    theirs.load_state_dict(state)
    ids = torch.tensor([[MEDIA, 20, *[MEDIA] * 6, 21], [22, 23, 24, *[MEDIA] * 4, 25, 26]])
    grids = torch.tensor([[1, 2, 2], [1, 4, 6], [1, 2, 8]])
    patches = torch.randn(int(grids.prod(1).sum()), 3, 8, 8)
    expected = theirs(input_ids=ids, pixel_values=patches, image_grid_thw=grids).logits
    torch.testing.assert_close(model(ids, patches, grids).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_without_vision_it_is_the_language_model(model):
    ids = torch.tensor([TEXT[0]])
    torch.testing.assert_close(model(ids).logits, model.language_model(ids).logits)


@torch.no_grad()
def test_documents_packed_into_a_row_are_read_as_if_alone(model):
    ids = torch.tensor([[token for document, _ in DOCUMENTS for token in document]])
    positions = torch.cat([torch.arange(len(document)) for document, _ in DOCUMENTS])[None]
    packed = model(ids, **together(DOCUMENTS), position_ids=positions).logits
    expected = torch.cat([model(**alone(document)).logits for document in DOCUMENTS], dim=1)
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_padded_batch_of_images_videos_and_texts_is_read_as_one_by_one(model):
    batch = model(**padded(DOCUMENTS)).logits
    for row, document in zip(batch, DOCUMENTS, strict=True):
        expected = model(**alone(document)).logits[0]
        torch.testing.assert_close(row[-len(expected) :], expected, atol=1e-4, rtol=1e-4)


def test_generation_with_and_without_cache_in_a_batch_and_alone(model):
    encoded = []
    hook = model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**padded(DOCUMENTS), **options)
    uncached = model.generate(**padded(DOCUMENTS), **options, use_cache=False)
    hook.remove()
    assert len(encoded) == 2, "the pictures are encoded once per call, not once per step"
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.logits, uncached.logits, atol=1e-4, rtol=1e-4)
    start = padded(DOCUMENTS)["input_ids"].shape[1]
    for row, document in zip(cached.sequences, DOCUMENTS, strict=True):
        expected = model.generate(**alone(document), max_new_tokens=6, do_sample=False)[0, len(document[0]) :]
        assert torch.equal(row[start : start + len(expected)], expected)


def test_samples_and_beams_see_the_pictures_of_their_row(model):
    batch = padded(DOCUMENTS)
    greedy = model.generate(**batch, max_new_tokens=5, do_sample=False)
    samples = model.generate(**batch, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(samples, greedy.repeat_interleave(3, dim=0))
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    beams = model.generate(**batch, **options)
    for i, document in enumerate(DOCUMENTS):
        expected = model.generate(**alone(document), **options)
        assert torch.equal(beams[2 * i : 2 * i + 2, -expected.shape[1] :], expected)


def test_a_conversation_goes_on_from_its_cache_with_new_pictures(model):
    (first, _), seen = VIDEO, pixels(VIDEO)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    turn = model.generate(input_ids=torch.tensor([first]), **seen, **options, return_dict_in_generate=True)
    both = torch.cat([turn.sequences, torch.tensor([IMAGE[0]])], dim=1)
    more = pixels(IMAGE)
    expected = model.generate(input_ids=both, **{k: torch.cat([seen[k], more[k]]) for k in seen}, **options)
    assert torch.equal(model.generate(both, **more, past_key_values=turn.past_key_values, **options), expected)


def test_generation_sees_the_picture(model):
    options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    first, again, other = (
        model.generate(input_ids=torch.tensor([VIDEO[0]]), **pixels(VIDEO, seed), **options).logits[0]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01


@torch.no_grad()
def test_it_never_writes_a_placeholder(tmp_path):
    model, inputs = make_model("llama"), alone(IMAGE)
    last = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    model.get_output_embeddings().weight[MEDIA] = 10 * last
    assert model(**inputs).logits[0, -1].argmax() == MEDIA
    model.save_pretrained(tmp_path)
    for writer in (model, K25Lite.from_pretrained(tmp_path)):
        assert writer.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1] != MEDIA


def test_the_loss_is_that_of_the_next_token_and_reaches_the_encoder(model):
    inputs = alone(VIDEO)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == MEDIA, -100)
    model.zero_grad()
    out = model(**inputs, labels=labels)
    out.loss.backward()
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[0, :-1], labels[0, 1:]))
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert not [name for name in without if "vision_tower" in name or "mm_projector" in name]
    model.zero_grad()


def test_embeddings_computed_apart_give_the_same_loss_and_gradients(models):
    """What a decoupled encoder does: forward without a graph, train the text, then run the encoder's backward."""
    model, inputs = models["dense"], alone(BOTH)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == MEDIA, -100)
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen = {name: inputs.pop(name) for name in ("pixel_values", "grid_thw")}
    with torch.no_grad():
        vision_embeds = model.encode_vision(**seen)
    vision_embeds.requires_grad_()
    model(**inputs, vision_embeds=vision_embeds, labels=labels).loss.backward()
    model.encode_vision(**seen).backward(vision_embeds.grad)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    model.zero_grad()


def test_it_trains_under_autocast(models):
    model = models["moe"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**padded(DOCUMENTS), labels=padded(DOCUMENTS)["input_ids"]).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([MEDIA] * 3 + [20], [[1, 2, 4]], "3 media tokens for 2 vision tokens"),
        ([MEDIA, 20], [[1, 2, 4]], "1 media tokens for 2 vision tokens"),
        ([20, 21], [[1, 2, 4]], "0 media tokens for 2 vision tokens"),
        ([MEDIA, 20], [], "1 media tokens for 0 vision tokens"),
    ],
)
def test_placeholders_must_match_the_vision_tokens(models, ids, grids, message):
    inputs = alone((ids, grids))
    with pytest.raises(ValueError, match=message):
        models["dense"](**inputs)
    for samples in (1, 2):
        with pytest.raises(ValueError, match=r"media tokens for \d vision tokens"):
            models["dense"].generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=samples)


def test_vision_inputs_that_contradict_each_other(models):
    inputs = alone(IMAGE)
    with pytest.raises(ValueError, match="not both"):
        models["dense"](**inputs, vision_embeds=torch.zeros(2, 128))
    del inputs["grid_thw"]
    with pytest.raises(ValueError, match="come together"):
        models["dense"](**inputs)


@torch.no_grad()
def test_saved_and_loaded_without_loss(model, tmp_path):
    model.save_pretrained(tmp_path)
    expected = model(**padded(DOCUMENTS)).logits
    for loader in (K25Lite, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded = loader.from_pretrained(tmp_path)
        assert isinstance(loaded, K25Lite)
        assert loaded.config.text_config.to_dict() | {"dtype": None} == model.config.text_config.to_dict()
        assert torch.equal(loaded(**padded(DOCUMENTS)).logits, expected)
        tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert tied == model.config.text_config.tie_word_embeddings
    seen = pixels(VIDEO)
    parts = Projector.from_pretrained(tmp_path)(MoonViT3D.from_pretrained(tmp_path)(**seen).pooler_output)
    torch.testing.assert_close(parts, model.encode_vision(**seen))


def test_a_checkpoint_of_another_configuration_is_refused(models, tmp_path):
    models["dense"].save_pretrained(tmp_path)
    vision_config = models["dense"].config.vision_config
    with pytest.raises(ValueError, match=r"missing, such as .*experts.* have no place in the model"):
        K25Lite.from_pretrained(tmp_path, config=K25LiteConfig.lite(VOCABULARY, moe=True, vision_config=vision_config))
    wider = K25LiteConfig.lite(VOCABULARY + 1, moe=False, vision_config=vision_config)
    with pytest.raises(ValueError, match=r"another shape, such as .*embed_tokens.weight \[60, 128\] for \[61, 128\]"):
        K25Lite.from_pretrained(tmp_path, config=wider)
    models["dense"].vision_tower.save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="of a 'kimi_k25_vision' model, not of a 'k25lite' one"):
        K25Lite.from_pretrained(tmp_path / "tower")
    with pytest.raises(OSError, match="nothing"):
        K25Lite.from_pretrained(tmp_path / "nothing")


def test_a_mixture_of_experts_has_the_active_parameters_of_the_dense_model():
    moe, dense = (K25Lite(K25LiteConfig.lite(VOCABULARY, moe=moe)).language_model for moe in (True, False))
    experts = [layer.mlp for layer in moe.model.layers[1:]]
    idle = sum(p.numel() for mlp in experts for p in mlp.experts.parameters()) * 6 // 8
    router = sum(mlp.gate.weight.numel() for mlp in experts)
    active = sum(p.numel() for p in moe.parameters()) - idle - router
    assert active == sum(p.numel() for p in dense.parameters())


def test_media_token_outside_the_vocabulary():
    with pytest.raises(ValueError, match="media_token_id 60 is outside the vocabulary of 60 tokens"):
        K25LiteConfig.lite(60, media_token_id=60)


def test_a_seed_fixes_the_initial_weights():
    first, second = make_model("moe").state_dict(), make_model("moe").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
