"""The noise contract: known answers, an independent implementation, every kernel's bits, statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import KERNELS, require_backend, same_bits

from ebmfast import backends, rng
from ebmfast.doctor import KNOWN_ANSWERS

# 1, 3, 5: tails of a Philox block. 8, 64: small chains sharing a register. 255, 256, 257: where chains stop
# sharing tiles, and tails of a tile. 1031: several tiles and a tail.
SIZES = [0, 1, 2, 3, 5, 8, 64, 255, 256, 257, 1031]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert rng.philox(counter, key) == words
    as_tensors = rng.philox([torch.tensor([c]) for c in counter], key)
    assert tuple(int(w) for w in as_tensors) == words
    as_arrays = rng.philox([np.array([c]) for c in counter], key)
    assert tuple(int(w[0]) for w in as_arrays) == words


def numpy_normals(n: int, chain: int, seed: int, step: int, stream: int) -> np.ndarray:
    """The contract written again, in numpy, from the text of the specification and not from rng.py."""
    blocks = -(-n // 4)
    counter = np.zeros((4, blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks)
    counter[1], counter[2], counter[3] = step, chain % 2**32, stream * 2**28 + chain // 2**32
    k0, k1 = seed % 2**32, seed // 2**32
    low = np.uint64(0xFFFFFFFF)
    for r in range(10):
        a, b = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        x = np.uint64((k0 + r * 0x9E3779B9) % 2**32)
        y = np.uint64((k1 + r * 0xBB67AE85) % 2**32)
        counter = np.stack(
            [b >> np.uint64(32) ^ counter[1] ^ x, b & low, a >> np.uint64(32) ^ counter[3] ^ y, a & low]
        )
    w = counter.astype(np.uint32)
    return np.stack([*pair(w[0], w[1]), *pair(w[2], w[3])], axis=1).ravel()[:n]


def polynomial(x: np.ndarray, *coefficients: str) -> np.ndarray:
    value = np.full_like(x, float.fromhex(coefficients[0]))
    for c in coefficients[1:]:
        value = value * x + np.float32(float.fromhex(c))
    return value


def pair(w0: np.ndarray, w1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    u = w0.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    shifted = u.view(np.int32) - np.int32(0x3F3504F3)
    e = (shifted >> 23).astype(np.float32)
    f = ((shifted & 0x7FFFFF) + 0x3F3504F3).view(np.float32) - np.float32(1)
    q = polynomial(
        f, "-0x1.65c77cp-3", "0x1.2504a0p-2", "-0x1.318526p-2", "0x1.535d30p-2", "-0x1.98d2c0p-2",
        "0x1.00049ap-1", "-0x1.5556f4p-1", "0x1.fffffap-1", "-0x1.0p+1",
    )  # fmt: skip
    radius = np.sqrt(e * np.float32(float.fromhex("-0x1.62e430p+0")) + f * q)
    x = (w1 << np.uint32(2)).view(np.int32).astype(np.float32) * np.float32(float.fromhex("0x1.921fb6p-32"))
    y = x * x
    sine = x * (y * polynomial(y, "-0x1.994eb4p-13", "0x1.110760p-7", "-0x1.555546p-3")) + x
    cosine = y * polynomial(y, "-0x1.647572p-10", "0x1.553f94p-5", "-0x1.ffffbap-2") + np.float32(1)
    k = (w1 + np.uint32(1 << 29)) >> np.uint32(30)
    c = np.choose(k, [cosine, -sine, -cosine, sine])
    s = np.choose(k, [sine, cosine, -sine, -cosine])
    return radius * c, radius * s


@pytest.mark.parametrize("chain", [0, 7, 2**32 - 1, 2**32, 2**60 - 1])
def test_numpy_gives_the_same_bits(chain):
    expected = numpy_normals(1031, chain, seed=2**63 + 11, step=2**32 - 1, stream=4)
    got = rng.normal((1031,), 1, seed=2**63 + 11, step=2**32 - 1, stream=4, first_chain=chain)[0]
    assert same_bits(got, torch.from_numpy(expected))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first_chain", [0, 2**32 - 2, 2**59])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_cpu_kernel_gives_the_same_bits(isa, size, first_chain, kind):
    options = {"seed": 2**64 - 1, "step": 5, "stream": rng.USER, "first_chain": first_chain}
    got = getattr(require_backend("cpu"), kind)((size,), 70, **options)
    assert same_bits(got, getattr(rng, kind)((size,), 70, **options)), isa


def test_words_at_the_edges():
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    u = rng.uniform_from_words(words)
    assert float(u.min()) == 2.0**-33 and float(u.max()) == 1 - 2.0**-24
    for w0 in words:
        for n in rng.box_muller(w0.expand(7), words):
            assert torch.isfinite(n).all() and float(n.abs().max()) < 6.77


def test_accuracy():
    w0, w1 = torch.randint(0, 2**32, (2, 200_000), generator=torch.Generator().manual_seed(0))
    radius = torch.sqrt(-2 * (w0.float() * 2.0**-32 + 2.0**-33).double().log())
    angle = w1.double() * (2 * math.pi / 2**32)
    n0, n1 = rng.box_muller(w0, w1)
    assert float((n0 - radius * angle.cos()).abs().max()) < 1e-6
    assert float((n1 - radius * angle.sin()).abs().max()) < 1e-6


@pytest.fixture(scope="module")
def sample() -> torch.Tensor:
    return require_backend("cpu").normal((1000,), 4000, seed=12345, step=0).double()


def test_moments(sample):
    """E z^k against (k - 1)!!, at five standard errors of the mean of z^k."""
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15), (8, 105)):
        values = sample**power
        error = values.std() / math.sqrt(values.numel())
        assert abs(float(values.mean()) - moment) < 5 * float(error), power


@pytest.mark.parametrize("threshold", [0.5, 1, 2, 3, 4, 4.5])
def test_tails(sample, threshold):
    p = math.erfc(threshold / math.sqrt(2))
    count = int((sample.abs() > threshold).sum())
    assert abs(count - sample.numel() * p) < 5 * math.sqrt(sample.numel() * p * (1 - p))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """In standard errors."""
    return abs(float((a * b).sum())) / math.sqrt(a.numel())


def test_neighbours_are_independent(sample):
    """Along a chain, across chains, steps, streams and seeds: no correlation of values or of squares."""
    other = {"step": {"step": 1}, "stream": {"stream": rng.INIT}, "seed": {"seed": 12346}}
    base = {"seed": 12345, "step": 0, "stream": rng.NOISE}
    pairs = {f"lag {k}": (sample[:, k:], sample[:, :-k]) for k in (1, 2, 3, 4)}
    pairs |= {"chain": (sample[1:], sample[:-1])}
    for name, change in other.items():
        pairs[name] = sample[:500], require_backend("cpu").normal((1000,), 500, **(base | change)).double()
    for name, (a, b) in pairs.items():
        assert correlation(a, b) < 5, name
        assert correlation((a**2 - 1) / math.sqrt(2), (b**2 - 1) / math.sqrt(2)) < 5, name


def test_neighbouring_seeds_share_nothing():
    """A step added to the seed would make noise(s, step 1) equal noise(s + 1, step 0)."""
    seeds, steps, streams = (5, 6, 7), (0, 1, 2), range(5)
    words = [rng.words(64, 4, seed=s, step=t, stream=u)[0] for s in seeds for t in steps for u in streams]
    blocks = torch.cat(words).flatten(0, 1)
    assert blocks.unique(dim=0).shape == blocks.shape == (3 * 3 * 5 * 4 * 16, 4)


def test_a_chain_does_not_depend_on_its_batch():
    whole = rng.normal((3, 7), 50, seed=1, step=2)
    assert same_bits(rng.normal((3, 7), 10, seed=1, step=2, first_chain=23), whole[23:33])
    assert same_bits(rng.normal((3, 7), [40, 3, 3], seed=1, step=2), whole[[40, 3, 3]])
    cpu = require_backend("cpu")
    assert same_bits(cpu.normal((3, 7), 10, seed=1, step=2, first_chain=23), whole[23:33])


def test_layout_is_row_major():
    assert same_bits(rng.normal((4, 6), 2, seed=1, step=0).flatten(1), rng.normal((24,), 2, seed=1, step=0))


def test_large_chain_ids_do_not_wrap():
    ids = [0, 2**32, 2**33, 2**59]
    values = rng.normal((16,), ids, seed=1, step=0)
    assert values.unique().numel() == values.numel()
    across = rng.normal((5,), 6, seed=1, step=0, first_chain=2**32 - 3)
    assert same_bits(across[3:], rng.normal((5,), 3, seed=1, step=0, first_chain=2**32))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first_chain", [0, 2**32 - 2, 2**59])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_backend_gives_the_same_bits(name, size, first_chain, kind):
    options = {"seed": 2**63 + 1, "step": 2**32 - 1, "stream": rng.USER, "first_chain": first_chain}
    got = getattr(require_backend(name), kind)((size,), 5, **options, device=backends.home(name))
    assert same_bits(got.cpu(), getattr(rng, kind)((size,), 5, **options))


@pytest.mark.parametrize("first", [2**31 - 8, 2**31, 2**32 - 8, 2**34 - 16])
@pytest.mark.parametrize("name", KERNELS)
def test_large_elements_do_not_wrap_on_any_backend(name, first):
    got = require_backend(name).normal((16,), 2, seed=1, step=0, first_element=first, device=backends.home(name))
    assert same_bits(got.cpu(), rng.normal((16,), 2, seed=1, step=0, first_element=first))


@pytest.mark.parametrize("first", [2**31 - 8, 2**31, 2**32 - 8, 2**34 - 16])
def test_large_elements_do_not_wrap(isa, first):
    expected = rng.normal((16,), 2, seed=1, step=0, first_element=first)
    assert same_bits(require_backend("cpu").normal((16,), 2, seed=1, step=0, first_element=first), expected)
    assert not set(expected.flatten().tolist()) & set(rng.normal((64,), 2, seed=1, step=0).flatten().tolist())


def test_first_element_continues_the_numbering():
    assert same_bits(
        rng.normal((9,), 3, seed=1, step=0, first_element=5), rng.normal((14,), 3, seed=1, step=0)[:, 5:]
    )


def test_threads_do_not_change_bits(threads):
    cpu = require_backend("cpu")
    values = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        values.append(cpu.normal((100,), 5000, seed=1, step=0))
    assert same_bits(values[0], values[1]) and same_bits(values[0], values[2])


def test_seeds():
    assert rng.resolve_seed(2**64 - 1) == 2**64 - 1
    assert rng.resolve_seed(np.int64(3)) == 3
    torch.manual_seed(0)
    first = rng.resolve_seed(None)
    torch.manual_seed(0)
    assert rng.resolve_seed(None) == first != rng.resolve_seed(None)
    generator = torch.Generator().manual_seed(0)
    assert rng.resolve_seed(generator) != rng.resolve_seed(generator)
    for bad in (-1, 2**64):
        with pytest.raises(ValueError, match=r"`seed` must be in \[0, 18446744073709551616\), got"):
            rng.resolve_seed(bad)
    for bad in (1.5, True, "7"):
        with pytest.raises(TypeError, match="`seed` must be an int"):
            rng.resolve_seed(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 2**32}, "`step` must be in"),
        ({"stream": 16}, "`stream` must be in"),
        ({"first_chain": 2**60}, "`first_chain` must be in"),
        ({"first_element": 2**34}, "`first_element` must be in"),
    ],
)
def test_ranges(change, message):
    with pytest.raises(ValueError, match=message):
        rng.normal((4,), 1, **({"seed": 0, "step": 0} | change))
