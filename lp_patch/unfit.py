"""Model types of transformers that cannot be pruned, each with its reason."""

ENCODER_DECODER = "it is an encoder-decoder: its pictures are no tokens of the decoder's prompt"
CROSS_ATTENTION = "it reads pictures through cross-attention, so its prompt holds no visual tokens"
OWN_GENERATE = (
    "its own generate() merges pictures and calls its language model past the forward that lp_patch patches, so that "
    "forwards would be pruned and generation not"
)
COUNTED_PLACES = "its layers tell how far keys are from a query by their places in the cache, which pruning changes"

UNFIT: dict[str, str] = {
    **dict.fromkeys(
        ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"), ENCODER_DECODER
    ),
    **dict.fromkeys(("blip", "evolla", "idefics", "mllama"), CROSS_ATTENTION),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "kosmos-2"), OWN_GENERATE),
    **dict.fromkeys(("inkling2", "inkling_mm_model"), f"{COUNTED_PLACES}, and convolve keys and values along it"),
    "chameleon": "its language model is the module that merges pictures, so that nothing lies between the two to patch",
    "diffusion_gemma": "it writes by diffusion of whole blocks, in a decoder that reads the cache of its prompt",
    "fuyu": "its encoder returns one row of patches for all pictures of a call, which nobody can tell apart",
    "git": "it puts pictures in front of the text inside the model, so its prompt holds no visual tokens",
    "glm5_next": "its indexer picks pools of neighbouring keys by their places in the cache, which pruning changes",
    "granite4_vision": (
        "features of its pictures enter at several decoder layers up to late ones, and none in the prompt's embeddings"
    ),
    "inkling2_loop": f"some of its layers run more than once in a forward; and {COUNTED_PLACES}",
    "kosmos-2.5": (
        "its language model merges pictures itself, at a mask beside the prompt, and adds absolute positions to them"
    ),
    "llama4": (  # in transformers 5.24 its own forward fails too: no image_outputs in what its language model returns
        "its forward projects pictures after the method that encodes them, where lp_patch does not look, and counts "
        "positions of its layers without rotary embedding in the cache"
    ),
    "minimax_m3_vl": "its layers pick blocks of keys by their places in the cache, which pruning changes",
    "mistral4": "it reads no pictures; as the language model of mistral3 it is supported",
    "pi0": "it generates no text: a second model reads the cache of its prompt and predicts actions",
    "pixtral": "it is a vision tower, part of models of type llava and mistral3: give the whole model",
    "qwen4_exp": (
        "its indexer looks up positions of all tokens seen by their places in the cache, which pruning changes, and "
        "its layers add embeddings of neighbouring token ids"
    ),
    "unlimited_ocr": "its cache keeps the prompt and forgets what was generated, by a length that pruning changes",
}
