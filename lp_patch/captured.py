"""The decoder layers of a prefill as a captured region runs them: what goes in, what they attend to, what comes out."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from . import cache as kv
from .attention import KEY
from .compat import CACHE, is_recurrent
from .cut import Cut, take_mask
from .forward import Forward
from .keys import Keys
from .plan import Plan
from .registry import RECURRENT, Parts
from .settings import Settings
from .trace import Record

BUCKET = 32  # tokens: how finely prompts are told apart by length
DEEP, DEEP_AT = "deepstack_visual_embeds", "visual_pos_masks"  # what the first layers add, and where
MASK = "mask of "
_KNOWN = {
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    CACHE,
    "past_key_values",
    "use_cache",
    "cache_position",
    KEY,
    "logits_to_keep",  # of the whole model; some hand it on
    "return_dict",
    DEEP,
    DEEP_AT,
}
FLAGS = ("output_attentions", "output_hidden_states", "output_router_logits")


class CapturedForward(Forward):
    """A forward inside a region: which keys are padding is a buffer, and nothing about it is asked.

    Args:
        cut: the first; padding stands first in it, and in every cut: it counts as text, which stays.
        valid: (1, N) bool, what is no padding, or None where nothing is padded.
        masked: whether layers are handed masks of their own for the tokens of the first cut.
    """

    def __init__(self, settings: Settings, plan: Plan, cut: Cut, valid: Tensor | None, masked: bool) -> None:
        super().__init__(settings, cut.length, None, None)
        self.plan, self.cuts, self.valid = replace(plan, kept=[cut.length]), [cut], valid
        self.record = Record(settings.shape, plan.visual, plan.text, plan.wiped, [])
        self.finder.masked = masked
        self._found: dict[tuple, Keys] = {}

    def _new_keys(self, config: Any, index: int, hidden: Tensor, given: Any) -> Keys:
        cut = self.cuts[-1]
        recurrent = self.kinds.names[index] == RECURRENT
        own = given if self.finder.masked and not recurrent else None
        key = (cut.start, recurrent, None if own is None else id(own))
        if key not in self._found:
            valid = None if self.valid is None else self.valid[:, : cut.length]
            if recurrent:
                mask = None  # the state of padding, which is zero, does not change
            elif own is None:
                mask = self._causal(cut, valid)
            else:
                places = self._among_first(cut)
                mask = own if cut.start == 0 else take_mask(own, places, places)
            self._found[key] = Keys(None if recurrent else valid, cut.length, mask)
        return self._found[key]

    def mask_for_all(self, config: Any, hidden: Tensor) -> Any:
        """The mask of the first layer with keys."""
        return self._new_keys(config, self.kinds.first, hidden, None).mask

    def _causal(self, cut: Cut, valid: Tensor | None) -> Tensor | None:
        if valid is None:
            return None
        causal = torch.ones(cut.length, cut.length, dtype=torch.bool, device=valid.device).tril()
        # padding sees itself: a row that sees nothing would be NaN
        return (causal & valid[:, None, None]) | (causal & causal.T)

    def _among_first(self, cut: Cut) -> Tensor:
        """(1, N) int64: where the tokens of a cut stand among those of the first."""
        found = cut.index
        for earlier in reversed([x for x in self.cuts[1:] if x.start < cut.start]):
            found = earlier.index.gather(1, found)
        return found


def why_not(parts: Parts, settings: Settings, forward: Forward, kwargs: dict, cache: Any) -> str | None:
    """Why this prefill's layers, whose keys are for `cache`, cannot be captured, or None."""
    config = parts.language_model.config
    implementation = config._attn_implementation or "sdpa"
    known = {*_KNOWN, *parts.adapter.per_token}
    more = [x for x, value in kwargs.items() if x not in known and value is not None and value is not False]
    if len(forward.cuts[0].where) > 1:
        return "a batch of several rows"
    if torch.is_grad_enabled():
        return "a forward with gradients"
    if forward.past or forward.finder.seen or forward.cuts[0].valid is not None:
        return "a prompt with padding, or on a cache that holds tokens"
    if more or any(getattr(config, x, False) for x in FLAGS):
        return f"a forward with {', '.join(more) or 'outputs of every layer'}"
    if implementation != "sdpa" and "flash" not in implementation:
        return f"attn_implementation={implementation!r}"
    if forward.gone is not None or settings.text_scorer.unrotates:
        return 'positions="compact"' if forward.gone is not None else f"text_scorer={settings.text_scorer.name!r}"
    if forward.finder.masked and any(x is not None and not isinstance(x, Tensor) for x in _masks(kwargs).values()):
        return "a prefill with masks that are no tensors"
    if torch.is_autocast_enabled("cuda"):
        return "a forward under autocast"
    if "dynamic" in str(rope := getattr(parts.rotary, "rope_type", None)) or "longrope" in str(rope):
        return "a rotary embedding that changes with the length of the prompt"
    if not isinstance(cache, (DynamicCache, StaticCache)):
        return f"a {type(cache).__name__}"
    if getattr(cache, "offloading", False):
        return "an offloaded cache"
    others = sorted({type(x).__name__ for x in cache.layers if not (kv.is_static(cache) or _can_fill(x))})
    return f"a cache of {', '.join(others)}" if others else None


def _can_fill(layer: Any) -> bool:
    if is_recurrent(layer):
        return not getattr(layer, "record_past", False)
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _masks(kwargs: dict) -> dict[str, Any]:
    given = kwargs["attention_mask"]
    return given if isinstance(given, dict) else {"": given}


def values_of(parts: Parts, forward: Forward, kwargs: dict, pad: int) -> dict[str, Tensor]:
    """What fills a region's buffers: the arguments of the language model, with `pad` tokens of padding on the left."""
    cut, left = forward.cuts[0], nn.functional.pad
    values = {
        "embeds": left(kwargs["inputs_embeds"], (0, 0, pad, 0)),
        "ids": left(kwargs["position_ids"], (pad, 0)),
        "where": left(cut.where + pad, (pad, 0)),
        "visual": left(cut.visual, (pad, 0)),
    }
    if is_bucketed(parts):
        values["valid"] = left(torch.ones_like(cut.visual), (pad, 0))
    if forward.weights is not None:
        asked = forward.weights.shape[1]
        more = -asked % BUCKET if is_bucketed(parts) else 0
        values["weights"] = left(forward.weights, (more, 0))[:, -cut.length - pad :]
    for name in parts.adapter.per_token:
        if kwargs.get(name) is not None:
            values[name] = left(kwargs[name], (*(0, 0) * (kwargs[name].dim() - 2), pad, 0))
    if kwargs.get(DEEP_AT) is not None:
        values[DEEP_AT] = left(kwargs[DEEP_AT], (pad, 0))
        values |= {f"{DEEP} {index}": x for index, x in enumerate(kwargs[DEEP])}
    if forward.finder.masked:
        for name, mask in _masks(kwargs).items():
            if mask is not None:
                # its last column is the last token; of a static cache, slots follow
                first = 0 if kv.is_static(forward.cache) else forward.new - mask.shape[3]
                values[MASK + name] = _padded(take_mask(mask, cut.where, cut.where - first), pad)
    return values


def is_bucketed(parts: Parts) -> bool:
    """Whether prompts of about the same length share a region; FlashAttention takes no mask, which padding needs."""
    return (parts.language_model.config._attn_implementation or "sdpa") == "sdpa"


def _padded(mask: Tensor, pad: int) -> Tensor:
    """A mask (B, H, N, N) with padding on the left, which sees itself and nobody else sees."""
    sees, unseen = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    mask = nn.functional.pad(mask, (pad, 0, pad, 0), value=unseen)
    mask[..., :pad, :pad] = sees
    return mask


def run_layers(
    parts: Parts, settings: Settings, plan: Plan, inputs: dict[str, Tensor], masks: tuple[str, ...] | None
) -> tuple[Any, CapturedForward, Cache]:
    """The language model's own forward on `values_of`, with the layers' hooks on.

    Args:
        masks: names of the masks that layers are handed; None where they look at all tokens before them.
    """
    module, where = parts.language_model, inputs["where"]
    cut = Cut(0, where.shape[1], where, where, None, inputs["visual"])
    forward = CapturedForward(settings, plan, cut, inputs.get("valid"), masks is not None)
    forward.weights = inputs.get("weights")
    if parts.true_positions:
        forward.true_ids = inputs["ids"]
    if masks is None:
        mask: Any = forward.mask_for_all(module.config, inputs["embeds"])
    elif masks == ("",):
        mask = inputs.get(MASK)
    else:
        mask = {name: inputs.get(MASK + name) for name in masks}
    given = {"inputs_embeds": inputs["embeds"], "attention_mask": mask, "position_ids": inputs["ids"]}
    given |= {name: inputs[name] for name in (DEEP_AT, *parts.adapter.per_token) if name in inputs}
    if DEEP_AT in inputs:
        given[DEEP] = [x for name, x in inputs.items() if name.startswith(DEEP)]
    cache = _recording(parts, settings)
    output = type(module).forward(module, **given, **{CACHE: cache, "use_cache": True, KEY: forward})
    return output, forward, cache


def mask_names(forward: Forward, kwargs: dict) -> tuple[str, ...] | None:
    """As `run_layers` wants them."""
    return tuple(_masks(kwargs)) if forward.finder.masked else None


def _recording(parts: Parts, settings: Settings) -> Cache:
    """A cache that keeps all keys, also of layers with windows."""
    if RECURRENT not in settings.kinds.names:
        return DynamicCache()
    cache = DynamicCache(config=parts.language_model.config)
    cache.layers = [x if is_recurrent(x) else DynamicLayer() for x in cache.layers]
    return cache


def leaves_no_state(parts: Parts, settings: Settings, plan: Plan, values: dict[str, Tensor], masks: Any) -> bool:
    """Whether padding, whose embeddings are zero, leaves layers without keys as they are: without biases it does."""
    nothing = {**values, "embeds": torch.zeros_like(values["embeds"])}
    _, _, cache = run_layers(parts, settings, plan, nothing, masks)
    return not any(bool(state.any()) for layer in cache.layers if is_recurrent(layer) for _, _, state in _states(layer))


def _states(layer: Any) -> list[tuple[str, int, Tensor]]:
    """What a layer without keys keeps: the method that updates it, its number, and the state; some keep nothing."""
    kinds = (("conv_states", "update_conv_state"), ("recurrent_states", "update_recurrent_state"))
    found = [(update, index, x) for name, update in kinds for index, x in getattr(layer, name, {}).items()]
    return [(update, index, x) for update, index, x in found if x is not None]


def adopt(forward: Forward, captured: CapturedForward, output: Any, stored: Cache, pad: int, cache: Any) -> Any:
    """Copies of what a region left, for the forward, its record and its cache; padding stays behind."""
    assert forward.record is not None and captured.record is not None
    for cut in captured.cuts[1:]:
        where = cut.where[:, pad:] - pad
        forward.cuts.append(Cut(cut.start, where.shape[1], where, where, None, cut.visual[:, pad:].clone()))
    if captured.record.stage2 is not None:
        _, chosen, scores = captured.record.stage2
        forward.record.note_stage2(forward.cuts[0].where, chosen[:, pad:].clone(), scores[:, pad:].clone())
    shared: dict[int, Keys] = {}
    for index, keys in enumerate(captured.keys):
        if id(keys) not in shared:
            latest = forward.cut_of(index)
            assert latest is not None
            places = latest.where if forward.finder.tracked else None
            shared[id(keys)] = Keys(None, keys.length - pad, None, places)
        forward.keys.append(shared[id(keys)])
    if cache is not None:
        _fill(forward, cache, stored, pad)
    # a cache that nobody asked for stays behind
    return type(output)(last_hidden_state=output.last_hidden_state[:, pad:].clone(), **{CACHE: cache})


def _fill(forward: Forward, cache: Cache, stored: Cache, pad: int) -> None:
    """Put copies of what each layer keeps, keys and values (B, KV, N, D) or a state, into an empty cache."""
    told: dict[int, kv.Slots] = {}
    mine: list[Tensor] = []
    theirs: list[Tensor] = []
    kept: Any
    for index, kept in enumerate(stored.layers):
        if index >= len(cache.layers):
            cache.layers.append(DynamicLayer())
        own: Any = cache.layers[index]
        if is_recurrent(kept):
            for update, number, state in _states(kept):
                getattr(own, update)(state, number)
            continue
        keys, values = (x[:, :, pad:] for x in (kept.keys, kept.values))
        if type(own) is DynamicLayer:
            own.lazy_initialization(keys, values)
            own.keys, own.values = torch.empty_like(keys), torch.empty_like(values)
            mine += [own.keys, own.values]
            theirs += [keys, values]
            continue
        if kv.is_static(cache):
            cut = forward.cut_of(index)
            assert cut is not None and forward.plan is not None
            told[cut.start] = kv.prepare_slots(
                cache, index, cut.where, None, 0, forward.new, forward.plan.tail, told.get(cut.start)
            )
        own.update(keys, values)
    if mine:
        torch._foreach_copy_(mine, theirs)
