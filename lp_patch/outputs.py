"""After the decoder layers: outputs of the input's length, and a cache that knows what it was not given."""

from typing import Any

from torch import Tensor

from . import cache as kv
from .compat import cache_out
from .cut import restore_index, take_tokens
from .errors import UnsupportedInputError
from .forward import Forward
from .registry import RECURRENT


def finish(forward: Forward, output: Any) -> None:
    """Give a pruned forward's output (a ModelOutput) back in the input's length; each removed position repeats the
    nearest surviving one before it.
    """
    if getattr(output, "router_logits", None) is not None:
        raise UnsupportedInputError(
            "output_router_logits=True: pruned layers route different numbers of tokens, of which transformers would "
            "make a wrong balancing loss. Leave it off, or remove the patch"
        )
    _mark_cache(forward, cache_out(output))
    restored: dict[int, Tensor] = {}

    def restore(index: int, state: Tensor) -> Tensor:
        """What decoder layer `index` was given or gave, in the input's length."""
        cut = forward.cut_of(index)
        assert cut is not None
        if cut.start not in restored:
            restored[cut.start] = restore_index(cut, forward.new)
        # the last states are of one stream
        return take_tokens(state, restored[cut.start], forward.settings.streams and state.dim() == 4)

    run, states = output.last_hidden_state, getattr(output, "hidden_states", None)
    output.last_hidden_state = restore(len(forward.keys) - 1, run)
    if states is not None:
        # entry 0 is the input of the first layer, entry i the output of layer i - 1
        output.hidden_states = tuple(
            output.last_hidden_state if state is run else None if state is None else restore(max(0, i - 1), state)
            for i, state in enumerate(states)
        )


def _mark_cache(forward: Forward, cache: Any) -> None:
    if cache is None:
        return
    if kv.is_static(cache):
        cache.layers[0].shift = forward.shift
        return
    told: dict[tuple, kv.Stored] = {}
    for index, keys in enumerate(forward.keys):
        if forward.kinds.names[index] == RECURRENT:
            continue
        cut = forward.cut_of(index)
        assert cut is not None and forward.plan is not None  # a forward that cuts
        key = (cut.start, cut.length, id(keys))
        if key not in told:
            told[key] = kv.Stored(
                dropped=forward.new - cut.length,
                valid=keys.valid,
                covered=keys.length,
                where=keys.where,
                tail=forward.plan.tail,
                shift=forward.shift,
                history=(kv.new_history_id(),),
            )
        kv.mark_pruned(cache, index, told[key])
