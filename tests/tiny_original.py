"""Tiny random LLaVA models in the authors' own package, and what the oracle looks at. Without the package: skipped."""

import atexit
import functools
import tempfile

import pytest
import torch
import transformers
from masked import expected
from tiny import EOS, LAYERS, PAD, SIDE, VOCAB, WIDTH, N, images
from torch.nn.functional import pad
from transformers import CLIPVisionConfig, CLIPVisionModel

llava = pytest.importorskip(
    "llava.model.language_model.llava_llama",
    reason="pip install --no-deps llava-torch==1.2.2.post1",
    exc_type=ImportError,
)
Processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)

IMAGE = -200  # the package's placeholder: one for a whole image
HIDDEN = 32


@functools.cache
def tower():
    """A folder with a random CLIP tower and its processor, as the package loads them."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=14 * SIDE,
        patch_size=14, projection_dim=WIDTH,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder.name)
    Processor().save_pretrained(folder.name)
    return folder.name


def tiny(seed=0, dtype=torch.float64, attention="sdpa", **options):
    """A random model whose weights are large enough for attention to differ between tokens."""
    folder = tower()  # draws, the first time
    torch.manual_seed(seed)
    config = llava.LlavaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=PAD,
        bos_token_id=EOS, eos_token_id=EOS, pretraining_tp=1, mm_vision_tower=folder, mm_hidden_size=WIDTH,
        mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        use_mm_proj=True, **options,
    )  # fmt: skip
    model = llava.LlavaLlamaForCausalLM(config)
    model.get_vision_tower().load_model()
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name:
                parameter.normal_(0, 1.0)
            elif parameter.dim() > 1:
                parameter.normal_(0, 1.2 * parameter[0].numel() ** -0.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # random models must not stop at random
    model.set_attn_implementation(attention)
    return model


def padded(rows, side):
    """Rows of ids -> ids (B, S) and mask (B, S)."""
    length = max(map(len, rows))
    short = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in rows]
    ids = [pad(torch.tensor(row), at, value=PAD) for row, at in zip(rows, short, strict=True)]
    masks = [pad(torch.ones(len(row), dtype=torch.long), at) for row, at in zip(rows, short, strict=True)]
    return torch.stack(ids), torch.stack(masks)


class Grown:
    """The language model on prompts in which each image stands with all its tokens: what the oracle looks at."""

    def __init__(self, model, rows, pictures, side, new=()):
        """Rows of ids as the package takes them; `pictures`: rows -> (n, 3, H, W); `new`: said after each row."""
        self.model, self.config, self.dtype = model, model.config, model.dtype
        self.set_attn_implementation, self.get_decoder = model.set_attn_implementation, model.get_decoder
        grown = [[y for x in row for y in ([IMAGE] * N if x == IMAGE else [x])] for row in rows]
        self.width = max(map(len, grown))
        ids, mask = padded(grown, side)
        self.visual = []
        for row in ids:
            at = (row == IMAGE).nonzero().flatten().tolist()
            self.visual.append([at[start : start + N] for start in range(0, len(at), N)])
        self.inputs = {"input_ids": ids, "attention_mask": mask}
        if len(new):
            ids, mask = torch.cat([ids, torch.as_tensor(new)], dim=1), pad(mask, (0, len(new[0])), value=1)
            # as generate() counts them
            self.inputs = {
                "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)
            }  # fmt: skip
        tower, projector = model.get_vision_tower().vision_tower, model.model.mm_projector
        with torch.no_grad():
            self.features = [
                list(tower(x, output_hidden_states=True).hidden_states[-2][:, 1:]) if len(x) else [] for x in pictures
            ]
            self.embeds = model.model.embed_tokens(ids.clamp(min=0))
            for i, (own, at) in enumerate(zip(self.features, self.visual, strict=True)):
                for feature, where in zip(own, at, strict=True):
                    self.embeds[i, where] = projector(feature)

    def __call__(self, input_ids, **options):
        return self.model(inputs_embeds=self.embeds, **options)

    def want(self, **theirs):
        decoder, options = self.model.model, {"end": self.width, "features": self.features, **theirs}
        return expected(self, decoder.layers, decoder, self.inputs, self.visual, **options)


def pictures_of(rows):
    """Rows -> (n, 3, H, W), and the images as the package takes them: one, unused, for a row without any."""
    numbers = [row.count(IMAGE) for row in rows]
    pictures = [images(n, seed=i) for i, n in enumerate(numbers)]
    given = [x if len(x) else images(1, seed=99) for x in pictures]
    return pictures, torch.cat(given)
