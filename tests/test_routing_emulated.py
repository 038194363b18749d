"""The choice of experts in CUDA C++, run on the CPU lane by lane, in any order of lanes."""

import ctypes
import functools
import random

import pytest
import torch

from dskernels.cuda.compiler import HEADERS
from dskernels.reference import routing as reference
from dskernels.routing import hopper
from emulating_cuda import build, has_compiler, pointer
from test_routing_hopper import KINDS, NAN, SINGLE, STRUCTURES, draw, far, options_of, widest

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs g++")

# What hopper.cu says in PTX. The sigmoid is that of torch to the bit on a GPU; here it is any other. A quick score is
# nearly as wrong as it may be.
STEPS, SELECTION = ((HEADERS / f"{name}.cuh").read_text() for name in ("routing", "routing_selection"))
IN_CPLUSPLUS = {
    r'#include "routing_selection.cuh"': SELECTION,
    r'#include "routing.cuh"': STEPS,
    r'#include "ptx.cuh"': "",
    r"    float step, exponent, power, guess;.*?leaves the nearest float\n": "return 1.f / (1.f + expf(-x));",
    r"    int lane;\n    asm volatile\(\"mov\.u32 %0, %%laneid;.*?return lane;": "return threadIdx.x % 32;",
    r"    u32 mask;.*?return mask;": "return (1u << threadIdx.x % 32) - 1;",
    r"    if constexpr \(sizeof\(T\) == 8\) asm volatile.*?return x;": "return x;",
    r"    float power, s;.*?return": (
        "const float s = (1.f + ((int)(random_number() % 11) - 5) * 0x1p-23f) / (1.f + expf(-x)); return"
    ),
    r'asm\("max\.NaN.*?\)\)\);': (
        "{ const float a = fabsf(quick_bias[v]); most = most != most || a != a ? NAN : max(most, a); }"
    ),
    r"wait_for_dependency\(\);|launch_dependents\(\);": "",
    r"kept_in_a_register\(smem_addr\(counts\)\)": "0",
    r"smem_count\(counts_addr \+ id \* 4\)": "atomicAdd(counts + id, 1)",
    r'asm volatile\("red\.shared.*?"memory"\);': "",
    r'        asm volatile\("red\.release.*?"memory"\);': "*word = *word >= (u32)gridDim.x ? 0 : *word + 1;",
    r"        u32 seen;.*?while \(seen == 0\);": 'if (*word == 0) fault("a block waits for one that is not there");',
    r'        asm volatile\("red\.relaxed.*?"memory"\);': "*word = *word >= (u32)gridDim.x ? 0 : *word + 1;",
    r'asm\("\{\.reg \.pred p; setp.*?"f"\(value\)\);': "if (theirs > value) ++place;",
}
ARGUMENTS = (
    "const float* logits, const float* bias, const int* physical, float* weights, int* experts, int* placed,"
    " float* sums, int* loads, int* nonfinite, u64 slot, long long stride, u32 tokens, u32 rows, int parts,"
    " int replicas, float scale"
)


@functools.cache
def emulated(structure, bias, more):
    vector = widest(structure[0], structure[2], structure[3], SINGLE)
    options = options_of(*structure, SINGLE, vector, bias=bias, parts=more, replicas=more)
    return build(hopper.SOURCE, IN_CPLUSPLUS, options, "route", ARGUMENTS).launch


def emulate(x, bias, structure, *, parts=None, physical=None, blocks=2, threads=64, kernel=None):
    """Weights, experts, placed, sums, load, nonfinite."""
    (tokens, n_experts), top_k, more = x.shape, structure[1], parts is not None
    out = [torch.full((tokens, top_k), value) for value in (NAN, -7, -7)]
    weights, experts, placed = out[0], out[1].int(), out[2].int()
    sums, load = torch.full((tokens, n_experts), NAN), torch.full((n_experts,), 77, dtype=torch.int32)
    nonfinite = torch.full((), 77, dtype=torch.int32)
    faults = (kernel or emulated(structure, bias is not None, more))(
        *(blocks, threads, random.getrandbits(31)),
        *map(pointer, (parts if more else x, bias, physical, weights, experts, placed, sums, load, nonfinite)),
        ctypes.c_ulonglong(7),
        ctypes.c_longlong(n_experts),
        *(
            tokens,
            -(-tokens // blocks),
            0 if parts is None else len(parts),
            0 if physical is None else physical.shape[1],
        ),
        ctypes.c_float(2.5),
    )
    assert faults == 0
    return weights, experts, placed, sums, load, nonfinite


EMULATED = [STRUCTURES[i] for i in (0, 3, 5, 8, 9, 11, 12, 14, 18)]


@pytest.mark.parametrize("structure", EMULATED, ids=str)
def test_emulated(structure):
    """In any order of lanes the choice is the reference's, of one block or several, of every kind of logits."""
    n_experts, top_k, n_groups, top_groups, score = structure
    options = dict(top_k=top_k, n_groups=n_groups, top_groups=top_groups, score=score)
    for i, kind in enumerate(KINDS * 2):
        x, bias = draw(kind, (1, 16, 40)[i % 3], n_experts, 2.0 if i % 2 else 0.1, "cpu")
        blocks, threads = ((1, 64), (3, 64), (2, 256))[i % 3]
        weights, experts, _, _, load, nonfinite = emulate(x, bias, structure, blocks=blocks, threads=threads)
        want = reference.route(x, bias, **options, scale=2.5)
        sure = far(x, bias, **options)
        if kind == "ties" and score == "sigmoid":
            sure[:] = True  # few different scores, whose order no rounding changes
        assert torch.equal(experts[sure], want.experts[sure])
        assert ((experts >= 0) & (experts < n_experts)).all()
        assert (experts.sort(1).values.diff(dim=1) != 0).all()
        s, void = reference.affinities(x, score)
        torch.testing.assert_close(weights, reference.gates(s, void, experts, True, 2.5), rtol=1e-5, atol=1e-30)
        assert torch.equal(load.long(), experts[~void].flatten().long().bincount(minlength=n_experts))
        assert nonfinite == want.nonfinite


@pytest.mark.parametrize("structure", [STRUCTURES[0], STRUCTURES[18]], ids=str)
def test_quick_scores_change_nothing(structure):
    """Against the same kernel with exact scores alone, where scores are so near that quick ones are often wrong."""
    replacements = {**IN_CPLUSPLUS, r"QUICK = PACKED && HELD == 1 && !SOFTMAX": "QUICK = false"}
    options = options_of(*structure, SINGLE, widest(structure[0], structure[2], structure[3], SINGLE))
    exact = build(hopper.SOURCE, replacements, options, "route", ARGUMENTS).launch
    n_experts = structure[0]
    # With a slack of 0 ids differ in 18 of the 360 rows of the second to fourth pair.
    pairs = ((2.0, 0.3), (2e-5, 1e-6), (5e-5, 1e-6), (1e-4, 0.0), (1e-5, 1e-6), (2e-5, 12.0), (1.0, 1e5), (30.0, 1e-6))
    for scale, spread in pairs:
        x = torch.randn(120, n_experts) * scale
        bias = torch.randn(n_experts) * spread if spread != 12 else (torch.randn(n_experts) * 4).round() * 3
        got, want = (emulate(x, bias, structure, kernel=kernel) for kernel in (None, exact))
        assert torch.equal(got[1], want[1])
        assert torch.equal(got[4], want[4])
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)


def test_emulated_parts_and_places():
    """Logits in two parts are those of their sum, which is written; choices are placed."""
    structure = STRUCTURES[0]
    x, bias = draw("plain", 20, 256, 1.0, "cpu")
    physical = torch.randint(-1, 50, (256, 3), dtype=torch.int32)
    first = torch.randn_like(x)
    parts = torch.stack([x - first, first])
    got = emulate(x, bias, structure, parts=parts, physical=physical, blocks=3)
    want = reference.route(parts[0] + parts[1], bias, top_k=8, n_groups=8, top_groups=4, scale=2.5)
    assert torch.equal(got[1], want.experts)
    assert torch.equal(got[2], reference.place(want.experts.long(), physical))
    assert torch.equal(got[3], parts[0] + parts[1])
    assert torch.equal(got[4], want.load)


def test_the_emulator_finds_a_missing_barrier():
    replacements = {**IN_CPLUSPLUS, r"    __syncwarp\(\);\n\n    int key\[EACH\]": "int key[EACH]"}
    structure = STRUCTURES[0]
    launch = build(
        hopper.SOURCE, replacements, options_of(*structure, SINGLE, 4, bias=False), "route", ARGUMENTS
    ).launch
    x, _ = draw("plain", 16, 256, 1.0, "cpu")
    weights, experts = torch.zeros(16, 8), torch.full((16, 8), -7, dtype=torch.int32)
    load, nonfinite = torch.zeros(256, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    tensors = map(pointer, (x, None, None, weights, experts, None, None, load, nonfinite))
    launch(1, 64, 5, *tensors, ctypes.c_ulonglong(7), ctypes.c_longlong(256), 16, 16, 0, 0, ctypes.c_float(1.0))
    want = reference.route(x, top_k=8, n_groups=8, top_groups=4).experts
    assert not torch.equal(experts, want)
