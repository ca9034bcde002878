"""Does the patch do right on this model? Tried on its tiny twin: pruned tokens against masked ones.

    twin      a random model of the same class and structure (`twin`)
    masked    the untouched twin, whose layers are told not to see what the patch removed: attention then gives every
              other token what it would give if those were gone

What it cannot see: the vision tower and its processor (which tokens a real prompt has for a picture, whether some of
them are line breaks, or several runs of them one picture), and whether a trained model's attention tells what matters.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import make_config
from .errors import UnsupportedModelError
from .handle import Patch
from .registry import IMAGE, RECURRENT, VIDEO, Adapter, Parts, adapter_for, find_parts, unwrap
from .settings import resolve
from .twin import Batch, make_batch, make_twin, stand_in

SIZES, EQUAL = ((12,), (9, 14), ()), ((12,), (12, 12), ())  # tokens of the pictures in each row
TOKENS, NEW = 3, 3
FULL_BUDGET = "full budget changes nothing"
CLOSE = 1e-4  # norms and rotary angles are float32


@dataclass(frozen=True)
class Checks:
    """What `check` found; `str()` is a table.

    Attributes:
        model_type: of the model.
        family: as its adapter calls it, or None if it has none.
        rows: what was asked, whether it holds (None: not asked), and more about it.
    """

    model_type: str
    family: str | None
    rows: list[tuple[str, bool | None, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all holds that could be asked, and a twin was run."""
        return self.failed is None and any(name == FULL_BUDGET and passed for name, passed, _ in self.rows)

    @property
    def failed(self) -> str | None:
        """The first that does not hold, in words."""
        return next((f"{name}: {why}" for name, passed, why in self.rows if passed is False), None)

    def __str__(self) -> str:
        said = {True: "yes", False: "NO", None: "-"}
        whole = f"an adapter ({self.family})" if self.family else "no adapter: the default declaration was tried"
        lines = [f"lp_patch.check: {self.model_type}, {whole}"]
        lines += [f"  {said[passed]:>3}  {name:<46} {why}".rstrip() for name, passed, why in self.rows]
        if not self.ok and self.failed is None:
            lines.append("  nothing was run: by what its type's tests say, not by this")
        return "\n".join(lines)


def check(model: nn.Module) -> Checks:
    """Try the patch on a tiny twin of this model's class and config: some seconds, on the CPU; the model does not run.

    Args:
        model: as `apply` takes it, with an adapter or without: then the default declaration is tried.

    Raises:
        UnsupportedModelError: its type is known not to fit, or it is no vision-language model.
    """
    inner = unwrap(model)
    adapter = adapter_for(inner)
    return _check(inner, adapter or _default_adapter(inner), adapter is not None)


def prove(model: Any) -> Adapter:
    """The default declaration for an unwrapped model of a type that nobody declared, if all checks hold.

    Raises:
        UnsupportedModelError: one does not.
    """
    adapter = _default_adapter(model)
    found = _check(model, adapter, known=False)
    if not found.ok:
        raise UnsupportedModelError(
            f"no adapter for {type(model).__name__} (model type {adapter.model_type!r}), and the default declaration "
            f"does not fit, as a tiny model of the same config shows: {found.failed}. CONTRIBUTING.md shows how to add "
            "one in a short file; lp_patch.register or an entry point makes it known"
        )
    return adapter


def _default_adapter(model: Any) -> Adapter:
    """All patch points at their usual places, for what this model's config has a placeholder for."""
    model_type, config = model.config.model_type, model.config
    modalities = tuple(
        m for m in (IMAGE, VIDEO) if hasattr(model, m.encode) and hasattr(config, str(m.placeholder))
    )  # fmt: skip
    return Adapter(model_type=model_type, family=model_type, modalities=modalities or (IMAGE,))


def _check(model: Any, adapter: Adapter, known: bool) -> Checks:
    found = Checks(model.config.model_type, adapter.family if known else None)

    def ask(name: str, question: Callable[[], str | None]) -> bool | None:
        """A question answers None where it holds, or says what is wrong, or, after a dash, why it was not asked."""
        try:
            said = question() or ""
        except Exception as error:  # a stranger's model may raise anything: the table says what
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.300}"
        passed = None if said.startswith("- ") else not said
        found.rows.append((name, passed, said.removeprefix("- ")))
        return passed

    trials: list[Trial] = []
    if not ask("all patch points are there", lambda: _plain(find_parts(model, adapter), known)):
        return found
    if not ask("a tiny twin can be made", lambda: _make(trials, model, adapter, known)):
        return found
    (trial,) = trials
    if ask("a picture's features take its placeholders", lambda: trial.merged(known)) is False:
        return found
    ask("what layers see is all before them", lambda: trial.causal(known))
    ask("pruned equals masked, in a padded batch", trial.masked)
    ask("a row keeps what it keeps alone", trial.alone)
    ask("generation: with a cache as without", trial.generated)
    ask(FULL_BUDGET, trial.full)
    ask("after removal all is as before", trial.removed)
    return found


def _make(trials: list["Trial"], model: Any, adapter: Adapter, known: bool) -> str | None:
    """A trial; where its type has an adapter, and tests, it may be that none can be made."""
    if adapter.merge is not None:
        return "- its adapter says how it merges: its tests have real prompts"
    # features of the twin's pictures are one picture each, and nothing else
    bare = replace(
        adapter, structural=None, split=None, projector=None, pictures=None, width=None, tower=None, fewest=None
    )
    try:
        trials.append(Trial(make_twin(model, adapter), bare))
    except Exception as error:
        if known:
            return f"- not by rule: {type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
        raise
    return None


def _plain(parts: Parts, known: bool) -> str | None:
    if known:
        return None
    if parts.blocks or any(getattr(x, "is_causal", True) is False for x in parts.attention):
        return "its tokens see later ones too: undeclared, only plain causal layers are trusted"
    if not parts.kinds.plain:
        return (
            f"its layers are {', '.join(sorted(set(parts.kinds.names)))}: undeclared, only full causal ones are trusted"
        )
    return None


class Trial:
    """A twin, a batch for it, and what is asked of both."""

    def __init__(self, twin: Any, adapter: Adapter) -> None:
        self.twin = twin
        self.parts = find_parts(twin, adapter)
        self.encoders = [stand_in(self.parts.base, m.encode) for m in self.parts.modalities]
        self.attention = "sdpa"
        try:
            self._attend("sdpa")
        except ValueError:
            self._attend("eager")
            self.attention = "eager"
            twin.float()  # its softmax runs in float32, where a row that sees nothing would be NaN in float64
        self.sizes = SIZES
        try:
            self.batch = self._batch()
            self.before = self._run(self.batch)
        except Exception as error:  # it may want pictures of one size, in one tensor
            self.sizes = EQUAL
            for encoder in self.encoders:
                encoder.stacked = True
            self.batch = self._batch()
            try:
                self.before = self._run(self.batch)
            except Exception:
                raise error from None

    def merged(self, known: bool) -> str | None:
        """The embeddings at the placeholders are the features."""
        seen: list[Tensor] = []
        hook = self.parts.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        try:
            self._run(self.batch)
        finally:
            hook.remove()
        if torch.equal(seen[0][self.batch.visual], torch.cat(self.batch.features).to(seen[0])):
            return None
        said = "the embeddings there are not what the encoder returned"
        return f"- {said}: its adapter says so" if known else said

    def causal(self, known: bool) -> str | None:
        """Every layer's own mask is causal, without padding."""
        real = self.batch.inputs["attention_mask"].bool()
        length = real.shape[1]
        plain = torch.ones(length, length).tril().bool() & real[:, None]
        for index, mask in enumerate(self._masks()):
            if mask is not None and not torch.equal((mask[:, 0] & real[:, None])[real], plain[real]):
                return f"{'- ' if known else ''}layer {index + 1} has another mask"
        return None

    def masked(self) -> str | None:
        """What the patch gives for tokens that stay is what the untouched twin gives where the others are hidden."""
        if RECURRENT in self.parts.kinds.names:
            return "- its layers without keys cannot be told what not to see"
        # the earliest that is allowed: what later layers would forgive shows there
        layer = next(x for x in self.parts.kinds.scoring() if x >= self.parts.first_cut)
        with self._patched(tokens=TOKENS, layer=layer) as patch:
            got, trace = self._run(self.batch), patch.trace
        assert trace is not None
        hidden = [self._removed(trace.stage1), self._removed(trace.stage2)]
        if torch.equal(hidden[0], hidden[1]) or not hidden[0].any():
            return "nothing was pruned in one of the stages"
        want = self._hide(layer, *hidden)
        left = self.batch.inputs["attention_mask"].bool() & ~hidden[1]
        return _far(got[left], want[left])

    def alone(self) -> str | None:
        """Rows without padding, one by one."""
        rows = [self._batch(row) for row in range(len(self.sizes))]
        real = self.batch.inputs["attention_mask"].bool()

        def difference(whole: Tensor) -> str | None:
            found = [_far(self._run(x)[0], whole[row][real[row]]) for row, x in enumerate(rows)]
            return next((f"row {row} {said}" for row, said in enumerate(found) if said), None)

        if (said := difference(self.before)) is not None:
            return f"- unpatched it does not either: {said}"
        with self._patched(tokens=TOKENS):
            return difference(self._run(self.batch))

    def generated(self) -> str | None:
        """Greedy steps, against those in which every step is a prefill."""
        if not hasattr(self.twin, "generate"):
            return "- it does not generate"
        found = []
        # without sizes of pictures, some models cannot count positions by what their tokens are
        inputs = {name: x for name, x in self.batch.inputs.items() if not name.endswith("token_type_ids")}
        with self._patched(tokens=TOKENS):
            for use_cache in (True, False):
                self._show(self.batch)
                out = self.twin.generate(
                    **inputs,
                    max_new_tokens=NEW,
                    do_sample=False,
                    use_cache=use_cache,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
                found.append(torch.stack(out.logits))
        return _far(*found)

    def full(self) -> str | None:
        """Bit for bit."""
        with self._patched(ratio=1.0):
            return None if torch.equal(self._run(self.batch), self.before) else "other numbers"

    def removed(self) -> str | None:
        """Bit for bit."""
        return None if torch.equal(self._run(self.batch), self.before) else "other numbers"

    # ------------------------------------------------------------------ with the twin

    def _batch(self, row: int | None = None) -> Batch:
        """All rows, or one of them alone, which then is what it was among the others."""
        text = self.parts.language_model.config
        return make_batch(self.twin, self.parts.modalities[0].placeholder, self.sizes, text.hidden_size, row)

    def _attend(self, implementation: str) -> None:
        self.parts.language_model.set_attn_implementation(implementation)

    def _show(self, batch: Batch) -> None:
        for encoder in self.encoders:
            encoder.features = batch.features

    @torch.no_grad()
    def _run(self, batch: Batch) -> Tensor:
        """(B, S, ...) logits, or last states of a model without head."""
        self._show(batch)
        output = self.twin(**batch.inputs, use_cache=False)
        logits = getattr(output, "logits", None)
        return output.last_hidden_state if logits is None else logits

    @contextmanager
    def _patched(self, **options: Any) -> Iterator[Patch]:
        patch = Patch(self.parts, resolve(self.parts, make_config(None, options), None))
        patch.put_back()
        try:
            yield patch
        finally:
            patch.remove()

    def _removed(self, kept: list[Tensor]) -> Tensor:
        """(B, S) bool: visual tokens that are not among those kept, numbered row by row."""
        gone = self.batch.visual.clone()
        for row, index in enumerate(kept):
            gone[row, self.batch.visual[row].nonzero().flatten()[index]] = False
        return gone

    def _masks(self) -> list[Tensor | None]:
        """What the untouched twin lets each layer see, (B, 1, S, S) bool."""
        found: list[Any] = []
        self._attend("eager")
        with ExitStack() as stack:
            for layer in self.parts.layers:
                hook = layer.register_forward_pre_hook(
                    lambda module, args, kwargs: found.append(kwargs["attention_mask"]), with_kwargs=True
                )
                stack.callback(hook.remove)
            self._run(self.batch)
        self._attend(self.attention)
        masks = [x if isinstance(x, Tensor) and x.dim() == 4 else None for x in found]
        return [x if x is None or x.dtype == torch.bool else x > torch.finfo(x.dtype).min / 2 for x in masks]

    def _hide(self, layer: int, first: Tensor, second: Tensor) -> Tensor:
        """The untouched twin, in which no layer sees tokens `first` (B, S), and none after `layer` of them `second`."""
        length = first.shape[1]
        itself, causal = torch.eye(length).bool(), torch.ones(length, length).tril().bool()
        real = self.batch.inputs["attention_mask"].bool()
        with ExitStack() as stack:
            for index, (module, own) in enumerate(zip(self.parts.layers, self._masks(), strict=True)):
                seen = real & ~(first if index < layer else second)
                allowed = (causal if own is None else own[:, 0]) & seen[:, None] | itself
                mask = torch.zeros(allowed.shape, dtype=self.twin.dtype).masked_fill(~allowed, -torch.inf)[:, None]
                hook = module.register_forward_pre_hook(
                    lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
                )
                stack.callback(hook.remove)
            return self._run(self.batch)


def _far(got: Tensor, want: Tensor) -> str | None:
    """By how much two tensors differ, where that is more than rounding."""
    difference = float((got.double() - want.double()).abs().max())
    return None if difference <= CLOSE * max(1.0, float(want.abs().max())) else f"differs by {difference:.1e}"
