"""What passes between host and device is learnt, and fits other inputs: against plain torch, on a pretended GPU."""

import pytest
import torch
from devices import CPU, FIRST, place, put
from pretended_gpu import Gpu

from lp_patch.host import HostValues

VALUES = torch.arange(24.0).reshape(4, 6)
MASK = VALUES.fmod(5) == 0
ROWS = torch.tensor([True, False, True, False])


def written(x, index, value):
    x = x.clone()
    x[index] = value
    return x


# name -> what a model might do with values (4, 6), a mask (4, 6) and rows (4,), all on the device
CASES = {
    "a mask": lambda x, m, r: x[m],
    "rows": lambda x, m, r: x[r],
    "rows and a slice": lambda x, m, r: x[r, 1:3],
    "after an ellipsis": lambda x, m, r: x.T[..., r],
    "a new dimension": lambda x, m, r: x[None, r],
    "a list": lambda x, m, r: x[[3, 0]],
    "a list of flags": lambda x, m, r: x[[True, False, False, True]],
    "the host's numbers": lambda x, m, r: x[torch.tensor([2, 2, 1])],
    "the host's mask": lambda x, m, r: x[torch.tensor([False, True, True, False])],
    "both": lambda x, m, r: x[torch.tensor([2, 1]), [0, 5]],
    "one of the device's numbers": lambda x, m, r: x[r.sum()],
    "up to the device's number": lambda x, m, r: x[: r.sum()],
    "written by a mask": lambda x, m, r: written(x, m, x[m] * 2),
    "written by rows": lambda x, m, r: written(x, r, x[r] + 1),
    "filled by a mask": lambda x, m, r: written(x, m, 7.0),
    "written from the host": lambda x, m, r: written(x, [0, 1], torch.ones(2, 6)),
    "copied from the host": lambda x, m, r: x.clone().copy_(torch.ones(4, 6)) + x,
    "nonzero": lambda x, m, r: m.nonzero(),
    "nonzero as a tuple": lambda x, m, r: torch.nonzero(m, as_tuple=True)[1],
    "where": lambda x, m, r: torch.where(m)[0],
    "argwhere": lambda x, m, r: torch.argwhere(m),
    "selected": lambda x, m, r: torch.masked_select(x, m),
    "selected, one for all": lambda x, m, r: x.masked_select(r[:, None]),
    "repeated": lambda x, m, r: x.repeat_interleave(r.long() + 1, dim=0),
    "repeated by name": lambda x, m, r: torch.repeat_interleave(x, repeats=r.long() + 1, dim=0),
    "numbers repeated": lambda x, m, r: torch.repeat_interleave(r.long() + 1),
    "repeated as often": lambda x, m, r: x.repeat_interleave(2, dim=0),
    "distinct": lambda x, m, r: torch.unique_consecutive(m.sum() // m.sum()) + x,
    "counted up": lambda x, m, r: torch.arange(r.sum(), device=x.device) + x[:2, :2],
    "as many zeros": lambda x, m, r: x.new_zeros(r.sum(), 6) + x[:2],
    "in parts": lambda x, m, r: x.split([r.sum(), (~r).sum()])[1],
    "asked": lambda x, m, r: x * r.sum().item(),
    "asked for all": lambda x, m, r: x[: len(r.sum().reshape(1).tolist())],
    "asked for truth": lambda x, m, r: x + 1 if r.any() else x,
    "on the host": lambda x, m, r: x * m.sum().cpu(),
    "from the host": lambda x, m, r: x * torch.tensor([2.0], device=x.device),
    "moved": lambda x, m, r: x * torch.full((6,), 3.0).to(x.device),
    "of another kind": lambda x, m, r: x.to(torch.float64) + m.to(x),
}


def on_gpu(*tensors):
    return [put(x.clone(), FIRST) for x in tensors]


@pytest.mark.parametrize("case", CASES)
def test_equals_what_torch_does(case):
    run = CASES[case]
    others = [(VALUES, MASK, ROWS), (VALUES.flip(0) + 0.5, MASK.flip(1), ROWS.flip(0))]
    want, known, gpu = [run(*x) for x in others], HostValues(), Gpu()
    with gpu:
        for x, expected in zip(others, want, strict=True):
            torch.testing.assert_close(run(*on_gpu(*x)).cpu(), expected)
        waited = len(gpu.waits)
        with known.learning():
            run(*on_gpu(*others[0]))
        for x, expected in zip(others, want, strict=True):
            inputs, gpu.mode = on_gpu(*x), "error"
            with known.replaying():
                found = run(*inputs)
            gpu.mode = 0
            assert place(found) == FIRST
            torch.testing.assert_close(found.cpu(), expected)
    quiet = case in ("filled by a mask", "repeated as often", "of another kind")
    assert quiet == (waited == 2)  # the results alone were asked for
    assert quiet == (not known.values)


def test_what_differs_is_told():
    def run(x):
        return x[: int(x.sum().item())]

    known, other, same = HostValues(), HostValues(), HostValues()
    with Gpu():
        for values, x in ((known, torch.ones(3)), (other, torch.ones(2)), (same, torch.ones(3))):
            with values.learning():
                run(*on_gpu(x))
        assert known.same(same) and not known.same(other)
        with known.replaying(), pytest.raises(RuntimeError, match="for more than it did before"):
            run(*on_gpu(torch.ones(3)))
            run(*on_gpu(torch.ones(3)))


def test_what_is_known_is_not_written_into():
    known = HostValues()

    def run():
        made = torch.tensor([1.0, 2.0], device=FIRST)
        asked = put(torch.tensor([3, 4]), FIRST).tolist()
        asked.append(5)
        return made.mul_(2), asked

    with Gpu():
        with known.learning():
            run()
        for _ in range(2):
            with known.replaying():
                made, asked = run()
            assert made.cpu().tolist() == [2, 4] and asked == [3, 4, 5]


def test_the_host_s_own_tensors_are_left_alone():
    known = HostValues()
    with Gpu(), known.learning():
        x = torch.tensor([1.0, 2.0])
        assert place(x[[0]]) == place(x.to(torch.float64)) == CPU and x.tolist() == [1, 2]
    assert not known.values
