"""InternVL's original remote code, by a tiny model of the same shape: what lp_patch can do with it, and what not.

The model merges inside forward() and, a second time, inside generate(), which then calls its language model's own; the
placeholder's id is an attribute that chat() sets.
"""

from types import SimpleNamespace

import masked
import pytest
import torch
from tiny_models.common import END, FIRST, IMAGE, PAD, START, pixels, text, text_config
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel, Qwen2Config

import lp_patch
from lp_patch import registry
from lp_patch.registry import Modality

SIDE, PATCH, WIDE = 6, 4, 16  # patches of a tile, of which 2 x 2 make a token; pixels; width of the tower
TOKENS, NEW = (SIDE // 2) ** 2, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}


class ChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, llm_config=None, vision_config=None, **kwargs):
        super().__init__(**kwargs)
        self.llm_config, self.vision_config = llm_config, vision_config


class Tower(nn.Module):
    """A [CLS] and patches of each tile (T, 3, H, W), which mix."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDE, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(WIDE))
        self.mix = nn.TransformerEncoderLayer(WIDE, 2, 24, batch_first=True)

    def forward(self, pixel_values):
        rows = self.patches(pixel_values).flatten(2).transpose(1, 2)
        rows = self.mix(torch.cat([self.cls.expand(len(rows), 1, -1), rows], dim=1))
        return SimpleNamespace(last_hidden_state=rows)


class InternVLChatModel(PreTrainedModel):
    """The shape of the original, no more: its methods, attributes and order of calls."""

    config_class = ChatConfig
    main_input_name = "pixel_values"
    base_model_prefix = "language_model"

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = Tower()
        self.language_model = AutoModelForCausalLM.from_config(config.llm_config)
        hidden = config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * WIDE), nn.Linear(4 * WIDE, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.img_context_token_id = None
        self.all_tied_weights_keys = {}

    def extract_feature(self, pixel_values):
        """(T, 3, H, W) -> (T, N, C)."""
        rows = self.vision_model(pixel_values).last_hidden_state[:, 1:]
        squares = rows.view(len(rows), SIDE // 2, 2, SIDE // 2, 2, WIDE).permute(0, 1, 3, 2, 4, 5)
        return self.mlp1(squares.reshape(len(rows), TOKENS, 4 * WIDE))

    def merged(self, input_ids, features):
        """What forward() and generate() both do, each in lines of its own."""
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        embeds[input_ids == self.img_context_token_id] = features.flatten(0, 1).to(embeds)
        return embeds

    def forward(self, pixel_values, input_ids, attention_mask=None, image_flags=None, **kwargs):
        features = self.extract_feature(pixel_values)[image_flags.squeeze(-1) == 1]
        embeds = self.merged(input_ids, features)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(self, pixel_values=None, input_ids=None, attention_mask=None, **kwargs):
        assert self.img_context_token_id is not None
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            embeds = self.merged(input_ids, self.extract_feature(pixel_values))
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def chat(self, ids, pixel_values, **kwargs):
        """With a tokenizer in the original, which tells it the placeholder's id."""
        self.img_context_token_id = IMAGE
        return self.generate(pixel_values=pixel_values, input_ids=ids, **kwargs)


class ShellConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, chat=None):
        super().__init__()
        if chat is not None:  # transformers compares a config with an empty one
            self.text_config, self.vision_config = chat.config.llm_config, chat.config.vision_config
            self.image_token_id = chat.img_context_token_id


class Shell(PreTrainedModel, GenerationMixin):
    """The same parts behind transformers' own generate(): what a user can write, without a change to the original.

    Its config says what the placeholder is; `model` merges in its forward, and has no head.
    """

    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, chat):
        super().__init__(ShellConfig(chat))
        self.generation_config = chat.language_model.generation_config
        self.model = Merging(chat)
        self.lm_head = chat.language_model.lm_head

    def forward(
        self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None, logits_to_keep=0, **kwargs
    ):
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids}
        out = self.model(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        out["logits"] = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        return out

    def prepare_inputs_for_generation(self, *args, pixel_values=None, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        return {**inputs, "pixel_values": pixel_values} if is_first_iteration else inputs

    def get_decoder(self):
        return self.model.language_model

    def set_attn_implementation(self, implementation):
        self.model.language_model.set_attn_implementation(implementation)


class Merging(nn.Module):
    def __init__(self, chat):
        super().__init__()
        self.vision_model, self.mlp1, self.language_model = chat.vision_model, chat.mlp1, chat.language_model.model
        self.get_image_features, self.merged = chat.extract_feature, chat.merged

    def forward(self, input_ids=None, inputs_embeds=None, pixel_values=None, **kwargs):
        if inputs_embeds is None and pixel_values is not None:
            inputs_embeds = self.merged(input_ids, self.get_image_features(pixel_values))
        elif inputs_embeds is None:
            inputs_embeds = self.language_model.get_input_embeddings()(input_ids)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


def tiny(seed=0):
    torch.manual_seed(seed)
    words = text_config("qwen2")
    del words["model_type"]
    model = InternVLChatModel(ChatConfig(llm_config=Qwen2Config(**words), vision_config=PreTrainedConfig()))
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.normal_(0, 1.0)
            elif parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter[0].numel() ** -0.5)
    settings = model.language_model.generation_config
    settings.pad_token_id, settings.eos_token_id, settings.suppress_tokens = PAD, None, list(range(FIRST))
    model.img_context_token_id = IMAGE
    return model


def scene(rows=((2, 5), (1, 2, 3), (6,))):
    """A padded batch: a row is tiles of its images, and text after them; where its images lie."""
    generator = torch.Generator().manual_seed(0)
    ids, spans, tiles = [], [], 0
    for *images, said in rows:
        own, places = text(generator, 2), []
        for count in images:
            places.append([len(own) + 1 + i for i in range(count * TOKENS)])
            own += [START, *[IMAGE] * (count * TOKENS), END]
            tiles += count
        ids.append(own + text(generator, said))
        spans.append(places)
    width = max(map(len, ids))
    padded = torch.tensor([[PAD] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    visual = [[[width - len(row) + i for i in x] for x in own] for row, own in zip(ids, spans, strict=True)]
    inputs = {"input_ids": padded, "attention_mask": mask}
    return {**inputs, "pixel_values": pixels(generator, tiles, 3, SIDE * PATCH, SIDE * PATCH).double()}, visual


def settings(**more):
    return {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **more}


def adapter(**more):
    given = {"model_type": "internvl_chat", "family": "InternVL (original)", "merge_adjacent": True, **more}
    return lp_patch.Adapter(**given)


WHOLE = {
    "language_model": "language_model.model", "layers": "language_model.model.layers",
    "rotary": "language_model.model.rotary_emb",
}  # fmt: skip
EXTRACT = (Modality("image", "extract_feature", IMAGE),)


@pytest.fixture(autouse=True)
def adapters(monkeypatch):
    """A registry of this test's own."""
    lp_patch.supported()
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))


def test_the_stand_in_says_the_same_in_forward_and_in_generate():
    model, (inputs, _) = tiny(), scene()
    flags = torch.ones(len(inputs["pixel_values"]), 1, dtype=torch.long)
    with torch.no_grad():
        ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=ids, image_flags=flags).logits[:, -1]
    found = model.generate(**inputs, **settings())
    torch.testing.assert_close(found.logits[0], logits, **CLOSE)
    said = model.chat(
        inputs["input_ids"], inputs["pixel_values"], attention_mask=inputs["attention_mask"], **settings()
    )
    assert torch.equal(said.sequences, found.sequences)


def test_its_merging_module_cannot_be_declared():
    """base_model_prefix names the language model: paths would start there, where nothing encodes pictures."""
    lp_patch.register(adapter(modalities=EXTRACT, **WHOLE))
    with pytest.raises(lp_patch.UnsupportedModelError, match="no 'extract_feature' below Qwen2ForCausalLM"):
        lp_patch.apply(tiny(), tokens=4)


@pytest.mark.parametrize("merge", ["forward", "generate"])
def test_it_has_no_method_that_returns_what_it_merged(merge):
    """`merge=` lets paths start at the whole model, but a generate() that is not transformers' own is refused."""
    lp_patch.register(adapter(modalities=EXTRACT, merge=merge, **WHOLE))
    with pytest.raises(lp_patch.UnsupportedModelError, match=r"InternVLChatModel.generate\(\) has no "):
        lp_patch.apply(tiny(), tokens=4)


@pytest.fixture
def shell():
    """The model in its shell, both declared and ready."""
    lp_patch.register(adapter())
    return Shell(tiny(seed=1))


def test_the_same_parts_behind_transformers_generate_can_be_pruned(shell):
    """Forward and generation against the masked oracle, tiles of an image under one budget."""
    inputs, visual = scene()
    decoder = shell.get_decoder()
    given = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    options = {"tokens": 4, "layer": 2}
    want = masked.expected(shell, decoder.layers, decoder, given, visual, **options)
    with torch.no_grad():
        plain = shell(**given).logits
        with lp_patch.applied(shell, **options) as patch:
            logits = shell(**given).logits
            assert [x.tolist() for x in patch.trace.stage2] == want.stage2
            torch.testing.assert_close(logits[want.left], want.logits[want.left], **CLOSE)
            found = shell.generate(**inputs, **settings())
        assert torch.equal(shell(**given).logits, plain)
    new = found.sequences[:, -NEW:]
    longer = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    given = {
        "input_ids": torch.cat([inputs["input_ids"], new], dim=1), "attention_mask": longer,
        "position_ids": (longer.cumsum(-1) - 1).clamp(min=0), "pixel_values": inputs["pixel_values"],
    }  # fmt: skip
    end = inputs["input_ids"].shape[1]
    want = masked.expected(shell, decoder.layers, decoder, given, visual, end=end, **options)
    torch.testing.assert_close(torch.stack(found.logits, dim=1), want.logits[:, -NEW - 1 : -1], **CLOSE)
    assert not torch.allclose(logits[:2], plain[:2], rtol=0, atol=0.1)


def test_the_shell_says_what_the_model_says(shell):
    chat, (inputs, _) = tiny(seed=1), scene()
    said = chat.generate(**inputs, **settings()).logits
    again = shell.generate(**inputs, **settings()).logits
    torch.testing.assert_close(torch.stack(again), torch.stack(said))
