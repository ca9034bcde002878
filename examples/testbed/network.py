"""The model, its tokenizer and processor, and the two training forwards that share its weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vocabulary import SPECIAL, words

VISION = 192
TEXT = 256
VISION_LAYERS = 7
TEXT_LAYERS = 6
HEADS = 4
SIDE, PATCH, GRID = 336, 14, 24
PATCHES = GRID * GRID
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A lower-case word-level tokenizer; a plural is its singular and a suffix.

    A prompt gets exactly one <s>, whoever makes it: rendered by the chat template or written by hand, tokenised with
    `add_special_tokens` or, as servers do, without. So the normaliser sets it, not a post-processor.
    """
    vocabulary = {word: index for index, word in enumerate(words())}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix="##"))
    one_start = normalizers.Replace(Regex(r"\A(<s>)?user:"), "<s>user:")
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), one_start])
    # normalised, that is looked for after it: each would else begin a text of its own for \A
    backend.add_special_tokens([AddedToken(word, normalized=True, special=True) for word in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )


def processor() -> LlavaProcessor:
    """The LLaVA processor over the Pillow CLIP image processor."""
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build() -> LlavaForConditionalGeneration:
    """An untrained model."""
    token = {word: index for index, word in enumerate(words())}
    vision = CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=4 * VISION,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=VISION,
    )
    text = LlamaConfig(
        hidden_size=TEXT,
        intermediate_size=768,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=len(token),
        max_position_embeddings=2048,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        bos_token_id=token["<s>"],
        eos_token_id=token["</s>"],
        pad_token_id=token["<pad>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token["<image>"],
        image_token_id=token["<image>"],
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=PATCHES,
        tie_word_embeddings=False,
    )
    config.pad_token_id = token["<pad>"]
    return LlavaForConditionalGeneration(config)


def normalise(pictures: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to CLIP-normalised (B, 3, H, W)."""
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN.to(pixels.device)) / STD.to(pixels.device)


def vision_transformer(model: LlavaForConditionalGeneration) -> nn.Module:
    """The CLIP transformer inside a model."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def _attend(layer: nn.Module, hidden: Tensor) -> Tensor:
    """One CLIP encoder layer with plain matrix products: their backward is fast on a CPU."""
    attention = layer.self_attn
    batch, length, width = hidden.shape
    heads = attention.num_heads
    normed = layer.layer_norm1(hidden)
    query, key, value = (
        projection(normed).view(batch, length, heads, width // heads).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = (query * (width // heads) ** -0.5) @ key.transpose(-1, -2)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
    hidden = hidden + attention.out_proj(mixed)
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def encode(vision: nn.Module, pixels: Tensor, positions: Tensor) -> Tensor:
    """[CLS] and patch features of layer -2 for crops whose patches sit at ``positions`` of the full grid."""
    embeddings = vision.embeddings
    batch, _, height, width = pixels.shape
    rows, columns = height // PATCH, width // PATCH
    flat = pixels.view(batch, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
    weight = embeddings.patch_embedding.weight.flatten(1)
    patches = F.linear(flat.reshape(batch, rows * columns, -1).to(weight.dtype), weight)
    table = embeddings.position_embedding.weight
    first = (embeddings.class_embedding + table[0]).expand(batch, 1, -1)
    hidden = vision.pre_layrnorm(torch.cat([first, patches + table[1:][positions]], 1))
    for layer in vision.encoder.layers[:-1]:
        hidden = _attend(layer, hidden)
    return hidden


def last_layer_cls(vision: nn.Module, hidden: Tensor) -> Tensor:
    """The final [CLS] feature after the last layer."""
    return vision.post_layernorm(_attend(vision.encoder.layers[-1], hidden)[:, 0])


class Master:
    """AdamW on fp32 copies of bf16 parameters."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.copies = [parameter.detach().float().clone() for parameter in self.parameters]
        groups = [
            {"params": [copy for copy in self.copies if copy.ndim > 1], "weight_decay": decay},
            {"params": [copy for copy in self.copies if copy.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)

    def step(self, rate: float, clip: float = 1.0) -> None:
        """One update at a learning rate; gradients are clipped and cleared."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_([copy for copy in self.copies if copy.grad is not None], clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.copies)

    def state_dict(self) -> dict:
        """Everything needed to go on."""
        return {"copies": self.copies, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a saved state."""
        with torch.no_grad():
            for copy, saved in zip(self.copies, state["copies"], strict=True):
                copy.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])


def cosine(progress: float, peak: float, floor: float = 0.02) -> float:
    """Cosine decay from a peak to a share of it."""
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
