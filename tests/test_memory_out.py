"""Memory that is out in the middle of a run: micro-batches are halved once, and chains come out as ever."""

import warnings

import pytest
import torch
from conftest import same_bits
from torch import nn

import ebmfast as ef

LANGEVIN = ef.Langevin(step_size=0.1)


class Greedy(nn.Module):
    """E(x) = |x|², for at most `most` rows, and only from call `late` on."""

    def __init__(self, most, late=0):
        super().__init__()
        self.most, self.late, self.calls = most, late, 0

    def forward(self, x):
        self.calls += 1
        if len(x) > self.most and self.calls > self.late:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x.square().sum(1)


def draw(model=None, batch_size=8, n=21, sampler=LANGEVIN, run=None, **options):
    e = ef.Concept(model or Greedy(100), name="greedy")
    run = run or ef.prepare(e, sampler, shape=(3,), steps=7, batch_size=batch_size, check=False, stack_models=False)
    return run(n=n, seed=1, **options)


@pytest.mark.parametrize("sampler", [
    LANGEVIN, ef.Langevin(drift=0.1, noise=0.1, noise_first=True), ef.MALA(0.1), ef.HMC(0.1, 2),
    ef.BAOAB(0.1)], ids=repr)
@pytest.mark.parametrize("late", [0, 3], ids=["at once", "in the middle"])
def test_micro_batches_are_halved_once(sampler, late):
    """An odd size, with a tail: what ran before stays, the rest is cut."""
    with pytest.warns(UserWarning, match="out of memory with micro-batches of 7 chains; going on with 4"):
        got = draw(Greedy(4, late=0 if late == 0 else 2 * 8 + late), batch_size=7, sampler=sampler)
    expected = draw(batch_size=7, sampler=sampler)
    assert same_bits(got.x, expected.x) and same_bits(got.energy, expected.energy)
    assert got.report.micro_batch == 4 and got.report.halved_from == 7 and expected.report.halved_from is None
    assert got.state.step.tolist() == [7] * 21


def test_once_is_once():
    with pytest.warns(UserWarning, match="going on with 4"), pytest.raises(torch.OutOfMemoryError) as caught:
        draw(Greedy(2))
    assert any("with micro-batches of 4 chains; batch_size=" in note for note in caught.value.__notes__)
    with pytest.raises(torch.OutOfMemoryError):
        draw(Greedy(0), batch_size=1)


def test_later_calls_remember():
    run = ef.prepare(ef.Concept(Greedy(4), name="greedy"), LANGEVIN, shape=(3,), steps=7, batch_size=8, check=False)
    with pytest.warns(UserWarning):
        first = draw(run=run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = draw(run=run)
    assert same_bits(first.x, second.x) and second.report.micro_batch == 4


def test_traces_and_resume():
    options = {"trace": ef.Trace(2, states=True)}
    with pytest.warns(UserWarning):
        got = draw(Greedy(4, late=11), **options)
    expected = draw(**options)
    assert same_bits(got.trace.x, expected.trace.x) and same_bits(got.trace.energy, expected.trace.energy)
    half = draw(Greedy(100), n=21)
    with pytest.warns(UserWarning):
        run = ef.prepare(ef.Concept(Greedy(4), name="greedy"), LANGEVIN, steps=5, batch_size=8, check=False)
        more = run(resume=half.state)
    assert same_bits(more.x, ef.sample(ef.Concept(Greedy(100)), sampler=LANGEVIN, n=21, shape=(3,), steps=12, seed=1).x)
