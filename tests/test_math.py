"""The shared mathematics of csrc/math, compiled on its own and held against 60-digit arithmetic."""

from __future__ import annotations

import ctypes
import math
import os
import random
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
ULPS = 2.0  # what the head of csrc/math/exp_log.h promises
EPS = 2.0**-52


class Tail(ctypes.Structure):
    """SoftmaxTail of csrc/math/softmax_tail.h."""

    _fields_ = (
        ("t", ctypes.c_double),
        ("m", ctypes.c_int64),
        ("r", ctypes.c_double),
        ("u1", ctypes.c_double),
        ("u2", ctypes.c_double),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    shared = tmp_path_factory.mktemp("math") / "math_host.so"
    command = [os.environ.get("CXX", "c++"), "-std=gnu++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi",
               "-Werror", f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "math_host.cpp"), "-o", str(shared)]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(shared))


def mapped(library, name, x):
    x = np.asarray(x, dtype=np.float64)
    x = np.concatenate([x, np.full(-len(x) % 4, x[-1])])
    scalar, vector = np.empty_like(x), np.empty_like(x)
    pointer = ctypes.POINTER(ctypes.c_double)
    getattr(library, name)(*(a.ctypes.data_as(pointer) for a in (x, scalar, vector)), ctypes.c_int64(len(x)))
    return x, scalar, vector


def check(x, got, truth):
    with mpmath.workdps(60):
        for value, result in zip(x, got, strict=True):
            exact = truth(mpmath.mpf(float(value)))
            assert math.isfinite(result), f"f({value!r}) = {result!r}, not finite"
            error = abs(mpmath.mpf(float(result)) - exact)
            ulps = float(error / abs(exact) / EPS) if exact else float(error > 0) * math.inf
            assert ulps <= ULPS, f"f({value!r}) = {result!r}, off by {ulps} ulp"


def spread(rng, low, high, count):
    return [math.ldexp(rng.uniform(1, 2), rng.randint(low, high)) for _ in range(count)]


def test_exp_is_within_two_ulps_and_exact_at_zero(library):
    rng = random.Random(0)
    x = [-v for v in spread(rng, -60, 8, 3000) if v <= 707.9] + [-rng.uniform(0, 708) for _ in range(3000)]
    x, scalar, vector = mapped(library, "map_exp", x)
    check(x, scalar, mpmath.exp)
    check(x, vector, mpmath.exp)
    for got in mapped(library, "map_exp", [0.0, -0.0])[1:]:
        assert got[:2].tolist() == [1.0, 1.0]


def test_exp_far_below_is_zero_and_nan_stays(library):
    _, scalar, vector = mapped(library, "map_exp", [-708.1, -1e4, -1e300, -math.inf, math.nan])
    for got in (scalar, vector):
        assert got[:4].tolist() == [0.0] * 4
        assert math.isnan(got[4])


def test_log_is_within_two_ulps_from_the_smallest_subnormal_to_the_largest_number(library):
    rng = random.Random(1)
    x = spread(rng, -1022, 1023, 3000) + [1 + rng.uniform(-0.3, 0.5) for _ in range(3000)]
    x += [1 + k * EPS for k in range(1, 200)] + [1 - k * EPS / 2 for k in range(1, 200)]
    x += [5e-324, 1e-310, 2.3e-308, math.nextafter(math.inf, 0)]
    x, scalar, vector = mapped(library, "map_log", x)
    check(x, scalar, mpmath.log)
    check(x, vector, mpmath.log)


def test_log_at_the_ends(library):
    for got in mapped(library, "map_log", [0.0, 1.0, math.inf, math.nan])[1:]:
        assert got[:3].tolist() == [-math.inf, 0.0, math.inf]
        assert math.isnan(got[3])


def test_log1p_keeps_relative_accuracy_below_one_ulp_of_one(library):
    rng = random.Random(2)
    x, scalar, vector = mapped(library, "map_log1p", spread(rng, -1000, 18, 4000))
    check(x, scalar, mpmath.log1p)
    check(x, vector, mpmath.log1p)
    for got in mapped(library, "map_log1p", [0.0])[1:]:
        assert got[0] == 0.0


FLOAT_EPS = 2.0**-23


def check_float(x, got, truth, least=0.0):
    """Within two units of float's last place; of ``least`` where the truth is less."""
    with mpmath.workdps(60):
        for value, result in zip(x, got, strict=True):
            exact = truth(mpmath.mpf(float(value)))
            off = float(abs(mpmath.mpf(float(result)) - exact) / max(abs(exact), least) / FLOAT_EPS)
            assert off <= ULPS, f"f({value!r}) = {result!r}, off by {off} of float's last place"


def test_logs_in_float(library):
    rng = random.Random(4)
    x = spread(rng, -126, 126, 1500) + [1 + rng.uniform(-0.3, 0.5) for _ in range(1500)]
    x, scalar, vector = mapped(library, "map_log_float", np.asarray(x, dtype=np.float32))
    check_float(x, scalar, mpmath.log, least=1.0)
    check_float(x, vector, mpmath.log, least=1.0)
    x = spread(rng, -126, 8, 3000) + [rng.uniform(0.3, 0.5) for _ in range(500)] + [0.0]
    x, scalar, vector = mapped(library, "map_log1p_float", np.asarray(x, dtype=np.float32))
    check_float(x, scalar, mpmath.log1p, least=1e-300)
    check_float(x, vector, mpmath.log1p, least=1e-300)


@pytest.mark.parametrize("temperature", (1.0, 0.37, 3.0, 1e-5, 1e5))
def test_exp_of_a_difference_in_float_has_no_rounding_of_the_difference(library, temperature):
    """Pairs of all sizes, most of which no float can hold the difference of."""
    rng = random.Random(5)
    least = -43.0 * temperature  # of a difference
    top = np.float32([rng.choice((-1, 1)) * rng.uniform(0, 60) * temperature for _ in range(3000)])
    x = np.float32([t - rng.choice((1e-3, 1.0, 60.0)) * rng.uniform(0, 1) * temperature for t in top])
    x = np.minimum(x, top)
    plain, scaled = np.empty_like(x), np.empty_like(x)
    pointer = ctypes.POINTER(ctypes.c_float)
    a, b, p, s = (v.ctypes.data_as(pointer) for v in (x, top, plain, scaled))
    library.exp_differences_float(
        a, b, ctypes.c_double(temperature), ctypes.c_float(-43.0), p, s, ctypes.c_int64(len(x))
    )
    with mpmath.workdps(60):
        exact = [mpmath.mpf(float(v)) - mpmath.mpf(float(t)) for v, t in zip(x, top, strict=True)]
        kept = [i for i, difference in enumerate(exact) if difference > 1.0001 * least]
        inverse = mpmath.mpf(1) / mpmath.mpf(temperature)
        check_float(kept, scaled[kept], lambda i: mpmath.exp(exact[int(i)] * inverse))
        if temperature == 1.0:
            check_float(kept, plain[kept], lambda i: mpmath.exp(exact[int(i)]))
    assert not scaled[[i for i, difference in enumerate(exact) if difference < 1.0001 * least - 1e-30]].any()


def merged(library, z, pairs, temperature=1.0):
    nodes = (Tail * (len(z) + len(pairs)))()
    flat = [node for pair in pairs for node in pair]
    library.merge((ctypes.c_double * len(z))(*z), ctypes.c_int64(len(z)), (ctypes.c_int64 * len(flat))(*flat),
                  ctypes.c_int64(len(pairs)), ctypes.c_double(1 / temperature), nodes)  # fmt: skip
    return nodes[len(z) + len(pairs) - 1]


def random_tree(rng, classes):
    alive, pairs = list(range(classes)), []
    while len(alive) > 1:
        a, b = rng.sample(alive, 2)
        pairs.append((a, b))
        alive = [node for node in alive if node not in (a, b)] + [classes + len(pairs) - 1]
    return pairs


LOGITS = {
    "plain": [0.3, -1.25, 2.5, 0.75, 2.25, -4.0],
    "tied": [1.0, 3.0, 3.0, 3.0, -2.0, 1.0],
    "confident": [0.0, 700.0, -3.0, 1.0, 0.5, 0.25],
    "far": [0.0, 10000.0, -10000.0, 9000.0],
    "masked": [-math.inf, 2.0, -math.inf, 1.0, 0.0],
    "one": [-math.inf, 2.0, -math.inf],
    "offset": [30000.25, 30001.5, 29990.0, 30001.5],
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_every_merge_order_gives_the_direct_sums(library, name, temperature):
    z = LOGITS[name]
    order = sorted(range(len(z)), key=lambda j: (-z[j], j))
    m, rest = order[0], [z[j] for j in order[1:] if z[j] > -math.inf]
    r = max(rest, default=-math.inf)
    with mpmath.workdps(40):
        u = [mpmath.exp((mpmath.mpf(x) - r) / temperature) for x in rest]
        u1, u2 = mpmath.fsum(u), mpmath.fsum(x * x for x in u)
    rng = random.Random(name)
    for _ in range(50):
        tail = merged(library, z, random_tree(rng, len(z)), temperature)
        assert (tail.t, tail.m, tail.r) == (z[m], m, r)
        # each of at most C - 1 merges rounds a few times
        bound = 8 * len(z) * EPS
        assert abs(tail.u1 - u1) <= bound * u1
        assert abs(tail.u2 - u2) <= bound * u2


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_survives_every_merge(library, poison):
    rng = random.Random(3)
    for _ in range(50):
        z = [5.0, -20.0, 700.0, poison, -math.inf, 0.0]
        rng.shuffle(z)
        tail = merged(library, z, random_tree(rng, len(z)))
        assert math.isnan(tail.u1) and math.isnan(tail.u2)


@pytest.mark.parametrize("gap", [0, 0.3, 1, 5, 10, 15, 16.9, 17.3, 20, 40, 88, 103.9, 105, 250, 700, 1000, 10000])
def test_split_against_sums_of_one_sign(library, gap):
    rest = [0.0, -0.5, -0.5, -3.0]
    with mpmath.workdps(60):
        u = [mpmath.exp(mpmath.mpf(x)) for x in rest]
        u1, u2 = mpmath.fsum(u), mpmath.fsum(x * x for x in u)
    out = (ctypes.c_double * 6)()
    numbers = [ctypes.c_double(float(x)) for x in (gap, 0.0, u1, u2, 1.0)]
    library.split(*numbers, out)
    with mpmath.workdps(60):
        g, a, b = mpmath.mpf(gap), mpmath.mpf(float(u1)), mpmath.mpf(float(u2))
        tau = mpmath.exp(-g) * a
        eps = tau / (1 + tau)
        truth = [
            g,
            1 / (1 + tau),
            eps,
            mpmath.log(eps),
            mpmath.log1p(tau),
            mpmath.log(eps * (2 - eps * (1 + b / a**2))),
        ]
    for got, exact in zip(out, truth, strict=True):
        if exact < mpmath.mpf(2) ** -1022 and exact >= 0:  # below the normal numbers: returned as 0
            assert 0 <= got <= 2.0**-1022
            continue
        # logs near 0 are sums of terms of this size, so their error is absolute
        assert abs(got - exact) <= 8 * EPS * max(abs(exact), 1 if exact < 0 else 0)
