"""What a patched model does in a forward: hooks that shorten hidden states, masks, positions and caches.

One forward, in order of the hooks; those up to the language model that do not cut are in `vision`:

    before/after_projector   stage 1 while the images are encoded: `before_projector` picks, so that removed tokens are
                             never projected; `after_projector` puts the survivors back at their places and fills the
                             others with -inf. That mark travels with the features wherever they go (through
                             `generate`, beams, the caller's hands), and the number of features stays what
                             transformers expects.
    before_language_model    cuts marked rows out of the sequence, with mask and positions; where a family has no
                             projector that works token by token, and for features from outside, stage 1 happens here
    before_rotary            gives the rotary embedding the true positions; nothing else sees their gaps, which
                             transformers would take for packed sequences
    observe_text             layer k: scores for stage 2 from that layer's own queries and keys
    before_layer             layer k + 1: cuts again; later layers get the shorter mask and positions
    after_language_model     gives outputs their input's length back, and tells the cache what was dropped

What the language model's forward decides lives in a `Run`, one per thread, made anew when it starts.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from . import cache as kv
from .attention import check_rotary, check_tappable, install_tap
from .budget import StageBudget, default_layer, inside_budget, stage_budget
from .compat import PREFILL_METHODS, cache_in, cache_out, causal_mask, uncounted, unmark
from .config import PruningConfig
from .errors import ConfigError, UnsupportedInputError
from .install import Installation
from .layout import Plan, VisualInput, find_inputs, make_plan
from .pruner import LearnablePruner
from .registry import Parts
from .score import received_attention
from .select import compact_index, restore_index, select_tokens, take, take_along, top_mask
from .strategies import SCORERS, Reading, Scorer, Stage1Input, Stage2Input, resolve_scorer, resolve_text_scorer
from .trace import InputScores, Record, Shape
from .vision import FEATURE_SCORES, REMOVED, PerThread, Shown, State, Vision, is_removed, shows_images


@dataclass
class Stage:
    """One shortening of the sequence, valid from decoder layer `start` on.

    Attributes:
        length: tokens per row, padding included.
        index: (B, length) into the previous stage's tokens (into the input for the first stage).
        valid: (B, length) bool, or None if no row is padded.
        visual: (B, length) bool.
        restore: (B, S), for each input position the slot that answers for it.
        rotary: cos and sin for its tokens, (B, length, D); None for the first stage, which the model computes itself.
    """

    start: int
    length: int
    index: Tensor
    valid: Tensor | None
    visual: Tensor
    restore: Tensor
    rotary: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class View:
    """What one decoder layer attends to. Layers of one stage and one cache history share it.

    Attributes:
        valid: (B, P + N) bool over the layer's physical keys, or None if all are real.
        keys: P + N; a static cache has more slots than that.
        mask: what to hand to the layer, in the form its attention back-end wants; unused for layer 0's own view,
            which the model builds.
    """

    valid: Tensor | None
    keys: int
    mask: Any = None


@dataclass
class Run:
    """All that one forward of the language model decides; `live` only where it prunes or its cache was pruned."""

    live: bool = False
    plan: Plan | None = None
    record: Record | None = None
    stages: list[Stage] = field(default_factory=list)
    views: dict[tuple, View] = field(default_factory=dict)
    layer_views: list[View] = field(default_factory=list)
    attention_mask: Tensor | None = None
    new_tokens: int = 0
    rotary_ids: Tensor | None = None
    shift: Tensor | None = None
    query_weights: Tensor | None = None
    rotary: tuple[Tensor, ...] = ()
    text_scores: Tensor | None = None


class SurgeryThread(PerThread):
    """What one thread is doing with the model."""

    run: Run | None = None
    record: Record | None = None
    assisted: bool = False
    candidates: int = 0


class SurgeryState(State):
    """All that changes while a patched model runs."""

    def __init__(self) -> None:
        self.local: SurgeryThread = SurgeryThread()
        self.last_run = Run()
        self.last_record: Record | None = None
        self.warned: set[str] = set()


class Surgery(Vision):
    """The hooks of one patched model."""

    state: SurgeryState

    def __init__(self, parts: Parts, config: PruningConfig, pruner: LearnablePruner | None) -> None:
        self.scorer, self.text_scorer = resolve_scorer(config.scorer, pruner), resolve_text_scorer(config.text_scorer)
        n_layers = len(parts.layers)
        # a default that DeepStack forbids would refuse a model that nobody gave a layer for
        default = min(max(self.text_scorer.layer or default_layer(n_layers), parts.first_cut), n_layers - 1)
        layer = default if config.layer is None else config.layer
        wipe = config.final_wipe_layer
        if not 1 <= layer < n_layers:
            raise ConfigError(f"layer must lie in [1, {n_layers - 1}] for {n_layers} decoder layers, got {layer}")
        if wipe is not None and not layer < wipe <= n_layers:
            raise ConfigError(
                f"final_wipe_layer must lie in [{layer + 1}, {n_layers}] (after layer={layer}), got {wipe}"
            )
        super().__init__(parts, SurgeryState())
        self.patch: Any = None  # the handle; found again through the hooks, also on a copy of the model
        self.config = config
        self.shape = Shape(n_layers, layer, None if wipe == n_layers else wipe)
        self.pruner = pruner
        self._check_strategies()
        self.readings = self._readings()
        check_tappable(parts.attention[layer - 1], f"the attention of decoder layer {layer}")
        if config.positions == "compact" and hasattr(parts.rotary, "mrope_section"):
            raise ConfigError(
                f'positions="compact" has no meaning for the several axes of position ids of {parts.adapter.family}: '
                'use positions="original"'
            )
        if layer < parts.first_cut and (config.stage_ratio > 1 or self.shape.wipe_layer is not None):
            raise ConfigError(
                f"{parts.adapter.family} adds visual features in its first {parts.first_cut} decoder layers: "
                f"layer must be at least {parts.first_cut}, got {layer}"
            )

    def __deepcopy__(self, memo: dict) -> "Surgery":
        # PEFT copies single modules (modules_to_save): their hooks stay this patch's, and the model is not copied along
        if id(self.parts.base) not in memo:
            return self
        copy = memo[id(self)] = Surgery.__new__(Surgery)
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _check_strategies(self) -> None:
        """Refuse options that the strategies would ignore."""
        config, scorer, text_scorer = self.config, self.scorer, self.text_scorer
        if (scorer.select or scorer.keeps_all) and config.diversity not in (0, PruningConfig.diversity):
            raise ConfigError(
                f"diversity={config.diversity} has no effect with scorer={scorer.name!r}, which has a rule of its own: "
                "leave it out"
            )
        if scorer.keeps_all and config.stage_ratio != PruningConfig.stage_ratio:
            raise ConfigError(
                f"stage_ratio={config.stage_ratio} has no meaning with scorer={scorer.name!r}, which keeps all tokens "
                "until stage 2: leave it out"
            )
        if text_scorer.alone and not scorer.keeps_all:
            raise ConfigError(
                f"text_scorer={text_scorer.name!r} is a method without stage 1, got scorer={scorer.name!r}: pass "
                'scorer="none", or another text_scorer'
            )
        if config.stage_ratio == 1 and config.text_scorer != PruningConfig.text_scorer:
            raise ConfigError(
                f"stage_ratio=1 switches stage 2 off, so text_scorer={config.text_scorer!r} has no effect: drop one"
            )
        if text_scorer.unrotates:
            check_rotary(
                self.parts.attention[self.shape.layer - 1], f"the attention of decoder layer {self.shape.layer}"
            )
        if scorer.keeps_all and config.ratio is not None:
            self.budget(1)  # refuses what is too small for any input

    def _readings(self) -> list[tuple[nn.Module, tuple[Reading, ...]]]:
        """The vision attention modules that the scorer reads, each once, and what it reads there."""
        if not self.scorer.reads:
            return []
        adapter = self.parts.adapter
        if adapter.vision_attention is None:
            allowed = sorted(f'"{name}"' for name, x in SCORERS.items() if not x.reads and not x.needs_pruner)
            raise ConfigError(
                f"scorer={self.scorer.name!r} needs a [CLS] token that ranks the visual tokens one to one, which "
                f'{adapter.family} does not have: use one of {", ".join(allowed)}, or "learned" with a pruner'
            )
        modules = adapter.vision_attention(self.parts.base)
        found: dict[int, tuple[Reading, ...]] = {}
        for reading in self.scorer.reads:
            number = max(1, round(reading.depth * len(modules)))
            check_tappable(modules[number - 1], f"the attention of vision layer {number}")
            found[number] = (*found.get(number, ()), reading)
        return [(modules[number - 1], readings) for number, readings in found.items()]

    def install(self, on: Installation) -> None:
        """Put the hooks on the model."""
        super().install(on)
        parts = self.parts
        for name in PREFILL_METHODS:
            if hasattr(parts.model, name):
                on.wrap(parts.model, name, self.around_prefill)
        if hasattr(parts.model, "_get_candidate_generator"):
            on.wrap(parts.model, "_get_candidate_generator", self.around_candidates)
            on.before(parts.model, self.before_model)
        if parts.projector is not None:
            on.before(parts.projector, self.before_projector)
            on.after(parts.projector, self.after_projector)
        on.after(parts.base, self.after_base)
        on.before(parts.language_model, self.before_language_model)
        on.after(parts.language_model, self.after_language_model)
        on.before(parts.rotary, self.before_rotary)
        for index, layer in enumerate(parts.layers):
            on.before(layer, partial(self.before_layer, index))
        if self.config.stage_ratio > 1:
            on.note(install_tap(parts.attention[self.shape.layer - 1], self.observe_text))
        for module, readings in self.readings:
            on.note(install_tap(module, partial(self.observe_vision, readings)))

    def budget(self, present: int) -> StageBudget:
        """What a visual input of `present` tokens keeps."""
        n_layers, layer, wipe_layer = self.shape
        average = self.config.average(present)
        if self.scorer.keeps_all:
            return inside_budget(average, present, n_layers, layer, wipe_layer)
        return stage_budget(average, present, n_layers, layer, self.config.stage_ratio, wipe_layer)

    # ------------------------------------------------------------------ stage 1

    def observe_vision(
        self, readings: tuple[Reading, ...], query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> None:
        """A vision layer's query and key (B, H, 1 + N, D), [CLS] first: what the scorer reads there, (B, N) each."""
        encoding = self._shown().encoding
        if encoding is None:
            return
        for reading in readings:
            asking = query[:, :, :1] if reading.of == "cls" else query
            batch, _, length, _ = asking.shape
            weight = torch.full((batch, length), 1 / length, device=query.device)
            with torch.no_grad():
                received = received_attention(asking, key, weight, scaling, causal=False)
            encoding.attention[reading] = received[:, 1:]

    @torch.compiler.disable
    def before_projector(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Stage 1: (B, N, C) encoder features -> (B, R1, C)."""
        encoding = self._shown().encoding
        if encoding is None:
            return None
        features = args[0]
        encoding.index = None
        index, scores = self._stage1(features, self.scorer, encoding.attention)
        encoding.scores += [None] * features.shape[0] if scores is None else list(scores)
        if index is None:
            return None
        encoding.index, encoding.present = index, features.shape[1]
        return (take(features, index), *args[1:]), kwargs

    @torch.compiler.disable
    def after_projector(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """(B, R1, D) projected survivors -> (B, N, D), removed rows marked."""
        encoding = self._shown().encoding
        if encoding is None or encoding.index is None:
            return None
        return _mark(output, encoding.index, encoding.present)

    def _stage1(
        self, features: Tensor, scorer: Scorer, attention: dict[Reading, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """(B, N, C) -> indices (B, R1), or None for all of them, and the scores (B, N) behind them, if any."""
        batch, present, _ = features.shape
        keep = self.budget(present).stage1
        if keep >= present:
            return None, None
        given = Stage1Input(features, keep, self.config.seed, tuple(attention[x] for x in scorer.reads), self.pruner)
        with torch.no_grad():
            if scorer.select is not None:
                index = scorer.select(given)
                _check_shape(scorer.name, index, (batch, keep))
                return index, None
            scores = None
            if scorer.score is not None:
                by_score = max(1, keep - round(self.config.diversity * keep))
                scores = scorer.score(replace(given, keep=by_score)).float()
                _check_shape(scorer.name, scores, (batch, present))
            return select_tokens(features, scores, keep, self.config.diversity), scores

    # ------------------------------------------------------------------ the whole model

    @torch.compiler.disable
    def around_prefill(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps the prefill of generate(): a prompt in chunks cannot ask about images of an earlier chunk."""
        given = [*args, *kwargs.values()]
        size = next((x.prefill_chunk_size for x in given if isinstance(x, GenerationConfig)), None)
        named = [kwargs, *(x for x in given if isinstance(x, dict))]
        shown = [name for x in named for name in x if shows_images(name, x[name])]
        if size is not None and shown:
            raise UnsupportedInputError(
                f"prefill_chunk_size={size} cuts the prompt between its images ({', '.join(shown)}) and the question, "
                "which stage 2 needs together: pass prefill_chunk_size=None, or remove the patch"
            )
        return wrapped(*args, **kwargs)

    @torch.compiler.disable
    def around_candidates(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        """Wraps the start of assisted decoding, whose first forward shows the prompt and guesses after it."""
        self.state.local.assisted = True
        return wrapped(*args, **kwargs)

    @torch.compiler.disable
    def before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """How many of the last tokens are guesses: they must not ask, or the answer would depend on them."""
        self.state.local.candidates = kwargs.get("logits_to_keep", 1) - 1 if self.state.local.assisted else 0
        self.state.local.assisted = False

    @torch.compiler.disable
    def after_base(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """No mark leaves the model: where a projector pruned, the features in its output are the survivors."""
        if self._own_run().stages and self.parts.projector is not None:
            unmark(output, lambda features: features[~is_removed(features)])

    # ------------------------------------------------------------------ the language model

    @torch.compiler.disable
    def before_language_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Cut removed rows out, or translate the mask of a later step to what the cache holds."""
        embeds = kwargs.get("inputs_embeds")
        before, run = self._take_shown(embeds), self._begin(Run())
        if before.shown and not before.features:
            self._warn(
                f"this call shows images, but no features of theirs passed {self.parts.adapter.family}'s "
                f"{' or '.join(m.encode for m in self.parts.modalities)}: nothing is pruned"
            )
        if embeds is not None and before.started and before.features:
            return self._prefill(run, before, args, kwargs)
        tokens = kwargs.get("input_ids") if embeds is None else embeds
        if tokens is not None and kv.seen_tokens(cache_in(kwargs)) == 0:
            given = before.embeds is not None or not before.started
            if given and embeds is not None and is_removed(embeds).any():
                raise UnsupportedInputError(
                    "inputs_embeds holds image features that lp_patch has pruned, already merged. Leave the "
                    "placeholder embeddings in and pass the features as mm_encoder_outputs, or encode them with the "
                    "patch removed"
                )
            batch, length = tokens.shape[:2]
            empty = torch.zeros(batch, length, dtype=torch.bool)
            self._keep(Record(self.shape, empty, empty, [length] * batch, [False] * batch, []))
        return self._continue(run, args, kwargs)

    def _continue(self, run: Run, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A forward without new visual tokens, perhaps on a pruned cache."""
        cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
        first = kv.pruned_layer(cache, 0)
        if first is None:
            return None
        tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        _check_mask(mask, cache, tokens.shape[1])
        run.live, run.attention_mask, run.new_tokens = True, _flat(mask, cache, tokens.shape[1]), tokens.shape[1]
        if first._self_shift is not None:
            ids = self._position_ids(kwargs, tokens.shape[1], tokens.device)
            run.rotary_ids = ids - first._self_shift.to(tokens.device)
        return args, {**uncounted(kwargs), "attention_mask": self._layer_0_mask(run, cache)}

    def _prefill(self, run: Run, before: Shown, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A forward with new visual tokens."""
        embeds, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), cache_in(kwargs)
        batch, length = embeds.shape[:2]
        device = embeds.device
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        flat = _flat(mask, cache, length)
        if flat is not None:
            real = flat[:, -length:].bool().to(device)
        modalities, masks, visual, structural = self._prompt(before, embeds, real)
        removed = visual & is_removed(embeds)
        packed = _starts_again(kwargs).to(device).expand_as(real)
        # the only wait for the device in a prefill
        real_h, visual_h, structural_h, removed_h, packed_h, *masks_h = torch.stack(
            [real, visual, structural, removed, packed, *masks]
        ).cpu()
        sizes = [[x.shape[:-1].numel() for x in before.features[m.name]] for m in modalities]
        merge = self.parts.adapter.merge_adjacent
        merges = [merge if isinstance(merge, bool) else m.name in merge for m in modalities]
        split = self._split(before)
        inputs = find_inputs(masks_h, sizes, structural_h, removed_h, merges, self.budget, split)
        scores = _encoder_scores(inputs, [x for m in modalities for x in before.features[m.name]])
        if any(x.pending for x in inputs):
            removed = self._stage1_late(embeds, inputs, removed, scores)
        plan = make_plan(inputs, real_h, visual_h, self.shape.wipe_layer is not None)
        run.record = self._keep(Record(self.shape, visual, removed, plan.text, plan.wiped, scores))
        if not any(x.survivors < x.present for x in inputs) and plan.stage2 == plan.survivors and not any(plan.wiped):
            return self._continue(run, args, kwargs)
        _check_mask(mask, cache, length)
        if packed_h.any():
            raise UnsupportedInputError(
                "position_ids with gaps and no attention mask mean several sequences packed into one row, which "
                "pruning would join: give each sequence its own row, with an attention mask"
            )
        kv.check_prunable(cache)

        run.live, run.plan, run.attention_mask, run.new_tokens = True, plan, flat, length
        keep = real & ~removed
        is_text, is_text_h = real & ~visual & ~structural, real_h & ~visual_h & ~structural_h
        if self.state.local.candidates:
            is_text[:, -self.state.local.candidates :] = is_text_h[:, -self.state.local.candidates :] = False
        # line breaks are no text, but a prompt that ends in one asks with it
        weigh = self.text_scorer.weigh
        weights = weigh(is_text, visual | structural, keep) * visual.any(dim=1, keepdim=True)
        # weights that lie after the images: a bound from the host's copies, on which late stage 1 shows nothing yet
        asking = weigh(is_text_h, visual_h | structural_h, real_h & ~removed_h) > 0
        asking = (asking & visual_h.any(dim=1, keepdim=True)).cumsum(dim=1) > 0
        n_queries = max(1, int((asking & real_h & ~removed_h).sum(dim=1).max()))
        ids = self._position_ids(kwargs, length, device)
        if self.config.positions == "compact":
            if ids.dim() > 2:
                raise UnsupportedInputError(
                    f'positions="compact" has no meaning for the {ids.shape[0]} axes of position ids of '
                    f'{self.parts.adapter.family}: use positions="original"'
                )
            first = kv.pruned_layer(cache, 0)
            shifted = 0 if first is None or first._self_shift is None else first._self_shift.to(device)
            gone = removed.cumsum(dim=1)
            run.shift = shifted + gone[:, -1:]
            ids = ids - shifted - gone
        stage = self._cut(run, 0, keep, plan.kept, visual)
        run.query_weights = take(weights * keep, stage.index)[:, -n_queries:]
        run.rotary_ids = take_along(ids.expand(*ids.shape[:-2], batch, length), stage.index)
        shortened = take(embeds, stage.index)
        if stage.valid is not None:
            # padding slots point at removed rows, and 0 * inf would spread through attention
            shortened = shortened.masked_fill(~stage.valid[..., None], 0.0)
        past = kv.stored_tokens(cache, 0)
        kwargs = {
            **uncounted(kwargs),
            "inputs_embeds": shortened,
            "attention_mask": self._layer_0_mask(run, cache),
            # contiguous: transformers takes a gap in position ids for the start of a packed sequence
            "position_ids": torch.arange(past, past + stage.length, device=device)[None],
        }
        if kwargs.get("visual_pos_masks") is not None:
            # DeepStack: features that the first layers add at visual positions
            at = kwargs["visual_pos_masks"].to(device)
            chosen = keep[at]
            kwargs["visual_pos_masks"] = _and(take(at, stage.index), stage.valid)
            kwargs["deepstack_visual_embeds"] = [x[chosen.to(x.device)] for x in kwargs["deepstack_visual_embeds"]]
        return args, kwargs

    def _split(self, before: Shown) -> Callable[[int, Tensor], list[int]] | None:
        """Images within a feature, from the row's ids; for them alone, a second wait for the device."""
        split = self.parts.adapter.split
        if split is None:
            return None
        if before.ids is None:
            raise UnsupportedInputError(
                f"{self.parts.adapter.family} tells a prompt's images apart by its token ids: give input_ids, not "
                "inputs_embeds"
            )
        ids = before.ids.cpu()
        return lambda row, positions: split(ids[row], positions)

    def _stage1_late(
        self, embeds: Tensor, inputs: list[VisualInput], removed: Tensor, scores: list[InputScores]
    ) -> Tensor:
        """Stage 1 on merged features (B, S, D): for families without a projector to hook, and features from outside.

        Returns `removed` (B, S) with the new losses; adds to `scores`.
        """
        scorer = self.scorer
        if scorer.reads or (scorer.needs_pruner and self.parts.projector is not None):
            scorer = SCORERS["diversity"]
            self._warn(
                f'scorer="{self.scorer.name}" reads the vision encoder, but this call brings features that were '
                'encoded without the patch: they are pruned by "diversity". Encode them with the patched model instead'
            )
        removed = removed.clone()
        for present in sorted({x.present for x in inputs if x.pending}):
            group = [x for x in inputs if x.pending and x.present == present]
            rows = torch.tensor([[x.row] for x in group], device=embeds.device)
            positions = torch.stack([x.positions for x in group]).to(embeds.device)
            index, score = self._stage1(embeds[rows, positions], scorer, {})
            assert index is not None  # pending means that there is something to remove
            removed[rows, positions] = torch.ones_like(positions, dtype=torch.bool).scatter_(1, index, False)
            if score is not None:
                scores += [InputScores(x.row, x.positions, s) for x, s in zip(group, score, strict=True)]
        return removed

    @staticmethod
    def _position_ids(kwargs: dict, new: int, device: torch.device) -> Tensor:
        """(B or 1, new) position ids as the caller counts them; the default is transformers' own."""
        ids = kwargs.get("position_ids")
        if ids is not None:
            return ids.to(device)
        seen = kv.seen_tokens(cache_in(kwargs))
        return torch.arange(seen, seen + new, device=device)[None]

    def _layer_0_mask(self, run: Run, cache: Any) -> Tensor | None:
        """The 2-D mask from which the model builds layer 0's own; notes layer 0's view."""
        keys = kv.stored_tokens(cache, 0) + (run.stages[-1].length if run.stages else run.new_tokens)
        view = run.views[_key(run, cache, 0)] = View(self._valid_keys(run, cache, 0), keys)
        return kv.mask_columns(cache, 0, view.valid)

    @staticmethod
    def _valid_keys(run: Run, cache: Any, index: int) -> Tensor | None:
        cut = (run.stages[-1].valid, run.stages[-1].length) if run.stages else None
        return kv.valid_keys(cache, index, run.attention_mask, run.new_tokens, cut)

    def _cut(self, run: Run, start: int, keep: Tensor, counts: list[int], visual: Tensor) -> Stage:
        """Begin the stage that keeps `keep` (B, N) of the current tokens; `counts` are its row sums."""
        length = max(1, *counts)
        index = compact_index(keep, length)
        restore = restore_index(keep, length)
        stage = Stage(
            start=start,
            length=length,
            index=index,
            valid=None if min(counts) == length else take(keep, index),
            visual=take(visual & keep, index),
            restore=restore.gather(1, run.stages[-1].restore) if run.stages else restore,
        )
        run.stages.append(stage)
        return stage

    @torch.compiler.disable
    def before_rotary(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """True positions for the rotary embedding."""
        ids = self._own_run().rotary_ids
        if ids is None:
            return None
        ids = ids[-3:] if ids.dim() == 3 else ids  # a fourth axis in front counts text alone, and is not rotated by
        if len(args) > 1:
            return (args[0], ids, *args[2:]), kwargs
        return args, {**kwargs, "position_ids": ids}

    def observe_text(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Layer k's rotated query (B, H, N, D) and key, and value (B, KV, P + N, D): scores of its N tokens."""
        run = self._run()
        # once per forward: gradient checkpointing runs the layer again
        if run.plan is None or run.text_scores is not None or run.plan.stage2 == run.plan.survivors:
            return
        weights = run.query_weights.to(query.device)  # type: ignore[union-attr]
        view = run.layer_views[-1]
        given = Stage2Input(
            query=query[:, :, query.shape[2] - weights.shape[1] :],
            key=key[:, :, : view.keys],
            value=value[:, :, : view.keys],
            key_mask=None if view.valid is None else view.valid.to(key.device),
            weights=weights,
            scaling=scaling,
            visual=run.stages[-1].visual.to(key.device),
            keep=max(run.plan.stage2),
            rotary=run.rotary,
        )
        with torch.no_grad():
            run.text_scores = self.text_scorer.score(given).float()
        _check_shape(self.text_scorer.name, run.text_scores, tuple(given.visual.shape))

    @torch.compiler.disable
    def before_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Give decoder layer `index` (from 0) the tokens, mask and positions of its stage."""
        run = self._run()
        if not run.live:
            return None
        hidden, cache = args[0], cache_in(kwargs)
        # decided once: before 5.18 gradient checkpointing calls a layer's hooks again in the backward pass
        if len(run.layer_views) == index:
            if index == self.shape.layer - 1:
                run.rotary = kwargs.get("position_embeddings", ())
            if run.plan is not None:
                for keep, counts in self._cuts_before(run, run.plan, index):
                    cut = self._cut(run, index, keep, counts, run.stages[-1].visual)
                    rotary = run.stages[-2].rotary or kwargs["position_embeddings"]
                    cut.rotary = tuple(take_along(x, cut.index, dim=-2) for x in rotary)
            run.layer_views.append(self._view(run, cache, index, hidden))
        stage, view = self._stage_of(run, index), run.layer_views[index]
        if stage is not None and stage.start == index and index > 0:
            hidden = take(hidden, stage.index)
        # the second: when decoding without padding, masks are None
        if view is run.layer_views[0] or (stage is None and view.mask is kwargs.get("attention_mask")):
            return None
        kwargs = {**kwargs, "attention_mask": view.mask}
        if stage is not None and stage.rotary is not None:
            kwargs["position_embeddings"] = tuple(x.to(hidden.device) for x in stage.rotary)
            kwargs["position_ids"] = torch.arange(stage.length, device=hidden.device)[None]
        return (hidden, *args[1:]), kwargs

    def _view(self, run: Run, cache: Any, index: int, hidden: Tensor) -> View:
        """What layer `index` attends to, shared by layers that hold the same tokens."""
        key = _key(run, cache, index)
        if key not in run.views:
            valid = self._valid_keys(run, cache, index)
            columns = kv.mask_columns(cache, index, valid)
            shape = hidden[:, : run.stages[-1].length] if run.stages else hidden
            mask = causal_mask(self.parts.language_model.config, shape, columns, cache, index)
            run.views[key] = View(valid, kv.stored_tokens(cache, index) + shape.shape[1], mask)
        return run.views[key]

    def _cuts_before(self, run: Run, plan: Plan, index: int) -> Iterator[tuple[Tensor, list[int]]]:
        """What vanishes before decoder layer `index`: (keep (B, N), its row sums) for each shortening due there."""
        last = run.stages[-1]
        if index == self.shape.layer and plan.stage2 != plan.survivors:
            if run.text_scores is None:
                raise UnsupportedInputError(
                    f"decoder layer {index} computed no attention through transformers' AttentionInterface: "
                    "stage 2 has no scores. Set stage_ratio=1 to run stage 1 alone"
                )
            scores = run.text_scores.to(last.visual.device)
            wanted = torch.tensor(plan.stage2, device=scores.device)
            chosen = top_mask(scores, last.visual, wanted)
            keep = _and(chosen | ~last.visual, last.valid)
            run.record.note_stage2(last.index, chosen, scores)  # type: ignore[union-attr]
            yield keep, [k - s + r for k, s, r in zip(plan.kept, plan.survivors, plan.stage2, strict=True)]
        if index == self.shape.wipe_layer and any(plan.wiped):
            last = run.stages[-1]
            wiped = torch.tensor(plan.wiped, device=last.visual.device)
            keep = _and(~(last.visual & wiped[:, None]), last.valid)
            rows = zip(plan.kept, plan.survivors, plan.stage2, plan.wiped, strict=True)
            yield keep, [k - s + (0 if w else r) for k, s, r, w in rows]

    @torch.compiler.disable
    def after_language_model(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Outputs of the input's length; a cache that knows what it was not given."""
        run = self._own_run()
        if not run.stages:
            return
        if getattr(output, "router_logits", None) is not None:
            raise UnsupportedInputError(
                "output_router_logits=True: pruned layers route different numbers of tokens, of which transformers "
                "would make a wrong balancing loss. Leave it off, or remove the patch"
            )
        stages = [stage for i in range(self.shape.n_layers) if (stage := self._stage_of(run, i))]
        cache = cache_out(output)
        if cache is not None:
            ids = {id(stage): kv.new_history_id() for stage in run.stages}
            for index, (stage, view) in enumerate(zip(stages, run.layer_views, strict=True)):
                dropped, history = run.new_tokens - stage.length, ids[id(stage)]
                kv.mark_pruned(cache, index, dropped, view.valid, run.plan.tail, run.shift, history)  # type: ignore[union-attr]
        output.last_hidden_state = take(output.last_hidden_state, stages[-1].restore)
        if getattr(output, "hidden_states", None) is not None:
            # entry 0 is the input of the first layer, entry i the output of layer i - 1
            output.hidden_states = tuple(
                None if state is None else take(state, stages[max(0, i - 1)].restore)
                for i, state in enumerate(output.hidden_states)
            )

    @staticmethod
    def _stage_of(run: Run, index: int) -> Stage | None:
        """The stage that layer `index` runs in, or None if this forward cuts nothing."""
        return next((stage for stage in reversed(run.stages) if stage.start <= index), None)

    def _own_run(self) -> Run:
        """This thread's run, or an empty one."""
        return self.state.local.run or Run()

    def _run(self) -> Run:
        """This thread's run; in autograd's workers, which run a checkpointed layer again, the latest one."""
        return self.state.local.run or self.state.last_run

    def _begin(self, run: Run) -> Run:
        self.state.local.run = self.state.last_run = run
        return run

    # ------------------------------------------------------------------ what users read

    def _keep(self, record: Record) -> Record:
        self.state.local.record = self.state.last_record = record
        return record

    @property
    def record(self) -> Record | None:
        """This thread's latest prefill, or the latest of any thread (a model that generates in a thread)."""
        return self.state.local.record or self.state.last_record

    def _warn(self, message: str) -> None:
        if message not in self.state.warned:
            self.state.warned.add(message)
            warnings.warn(message, stacklevel=2)


def _mark(survivors: Tensor, index: Tensor, present: int) -> Tensor:
    """(B, R, D) at rows `index` (B, R) of (B, present, D), all other rows marked as removed."""
    batch, _, width = survivors.shape
    rows = index.to(survivors.device)[..., None].expand(-1, -1, width)
    return survivors.new_full((batch, present, width), REMOVED).scatter(1, rows, survivors)


def _check_shape(strategy: str, answer: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what a strategy from outside must not answer."""
    if answer.shape != shape:
        raise ConfigError(f"the strategy {strategy!r} answered {tuple(answer.shape)}, {shape} was asked for")


def _and(keep: Tensor, valid: Tensor | None) -> Tensor:
    return keep if valid is None else keep & valid


def _key(run: Run, cache: Any, index: int) -> tuple:
    """Layers with equal keys see the same tokens."""
    return len(run.stages), kv.history(cache, index)


def _encoder_scores(inputs: Sequence[VisualInput], features: Sequence[Tensor]) -> list[InputScores]:
    """Stage-1 scores that travelled with the features, where these are the inputs one to one."""
    if len(inputs) != len(features):
        return []
    found = [(x, getattr(feature, FEATURE_SCORES, None)) for x, feature in zip(inputs, features, strict=True)]
    return [InputScores(x.row, x.positions, score) for x, score in found if score is not None]


def _starts_again(kwargs: dict) -> Tensor:
    """(B or 1, S) bool: where transformers sees a new packed sequence begin, in the axis that counts text."""
    ids = kwargs.get("position_ids")
    length = kwargs["inputs_embeds"].shape[1]
    if ids is None or kwargs.get("attention_mask") is not None or (ids.dim() == 3 and ids.shape[0] != 4):
        return torch.zeros(1, length, dtype=torch.bool)
    text = ids[0] if ids.dim() == 3 else ids
    return torch.nn.functional.pad(text.diff(dim=-1) != 1, (1, 0))


def _flat(mask: Any, cache: Any, new: int) -> Tensor | None:
    """The mask as (B, tokens seen + new), or None if all are real, or if that cannot be told.

    For a static cache, generate() brings a 4-D one. In a prefill it shows who is padding: nobody attends to them. Later
    it was made for slots that a pruned cache does not have, and tokens that came since are real (`_check_mask`).
    """
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    if isinstance(mask, Tensor) and mask.dim() == 4 and kv.is_static(cache) and kv.seen_tokens(cache) == 0:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return seen.any(dim=1).any(dim=1)[:, :new]
    return None


def _check_mask(mask: Any, cache: Any, new: int) -> None:
    """Refuse masks from which nobody can tell what is padding."""
    if mask is None or _flat(mask, cache, new) is not None:
        return
    if isinstance(mask, Tensor) and kv.is_static(cache) and (new == 1 or mask.shape[0] == 1):
        return
    raise UnsupportedInputError(
        "a pruned prompt needs the 2-D attention mask (batch, tokens) or None, got "
        + (f"one of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__)
        + "; on a static cache, later turns of several tokens need batch size 1"
    )
