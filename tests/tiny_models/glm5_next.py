"""GLM-5.3: linear attention in three of four layers, in the fourth latent keys, picked in pools of four; experts."""

from transformers import AutoConfig

from .common import HIDDEN, IMAGE, Tiny, text_config
from .qwen3_5 import PATCH, merged_patches


def config():
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": PATCH,
        "out_hidden_size": HIDDEN, "projection_intermediate_size": 24,
    }  # fmt: skip
    text = text_config(
        "glm5_next_text", num_hidden_layers=8, num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=4,
        num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=16, v_head_dim=8, qk_nope_head_dim=8, index_topk=8,
        index_kpool=4, index_head_dim=8, index_n_heads=16, linear_head_dim=8, linear_num_heads=4,
        linear_lower_bound=-0.3,  # the layers then remember more than a token or two, as trained ones do
    )  # fmt: skip
    return AutoConfig.for_model("glm5_next", vision_config=vision, text_config=text, image_token_id=IMAGE)


ROWS = ((3, (3, 4), 5), (2, (4, 3), 1, (2, 5), 3), (6,))
TYPES = {"glm5_next": Tiny(config, merged_patches, ROWS, layer=4)}
