"""The shapes that benchmarks and tests speak of: DeepSeek-V3's own, named by their sizes, defined once.

A workload is sizes and nothing else: no tensors, and no import heavier than the standard library. Uneven sizes (rows of
a group, lengths of a request) are drawn from a generator seeded by the sizes, so that the same name is the same job
everywhere.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Protocol

HIDDEN = 7168
EXPERTS, TOP_K, GROUPS, TOP_GROUPS = 256, 8, 8, 4
EXPERT_WIDTH = 2048
HEADS = 128
NOPE_DIM, ROPE_DIM, VALUE_DIM = 128, 64, 128
QK_DIM = NOPE_DIM + ROPE_DIM  # 192, a head of prefill
LATENT_DIM = 512
ROW_DIM = LATENT_DIM + ROPE_DIM  # 576, a cached token
FP8_ROW_BYTES = LATENT_DIM + 4 * (LATENT_DIM // 128) + 2 * ROPE_DIM  # 656


class Workload(Protocol):
    """Sizes of one job."""

    @property
    def name(self) -> str:
        """The sizes, spelt out: ``m4096_n7168_k2048``."""


@dataclass(frozen=True)
class Rows:
    """A matrix of `m` tokens by `n` channels that is normed, gated or quantised."""

    m: int
    n: int

    @property
    def name(self) -> str:
        return f"m{self.m}_n{self.n}"


@dataclass(frozen=True)
class Gemm:
    """``[m, k] @ [n, k].T``."""

    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"m{self.m}_n{self.n}_k{self.k}"


@dataclass(frozen=True)
class GroupedGemm:
    """`g` products ``[about m, k] @ [n, k].T``, one for each expert; the rows of a group vary by 30% about `m`."""

    g: int
    m: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"g{self.g}_m{self.m}_n{self.n}_k{self.k}"

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each group."""
        return _uneven(self.g, self.m)

    @property
    def capacity(self) -> int:
        """Rows that the masked layout reserves for each group."""
        return 2 * self.m


@dataclass(frozen=True)
class GroupedRows:
    """`g` groups of about `m` rows of `n` channels, which vary as in `GroupedGemm`."""

    g: int
    m: int
    n: int

    @property
    def name(self) -> str:
        return f"g{self.g}_m{self.m}_n{self.n}"

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each group."""
        return _uneven(self.g, self.m)


def _uneven(groups: int, rows: int) -> tuple[int, ...]:
    draw = random.Random(f"g{groups}_m{rows}")
    return tuple(max(1, round(rows * draw.uniform(0.7, 1.3))) for _ in range(groups))


@dataclass(frozen=True)
class Route:
    """`t` tokens choosing `k` of `e` experts, which stand in `g` groups of which a token may use `top_groups`."""

    t: int
    e: int = EXPERTS
    k: int = TOP_K
    g: int = GROUPS
    top_groups: int = TOP_GROUPS
    score: str = "sigmoid"

    @property
    def name(self) -> str:
        return f"t{self.t}_e{self.e}_k{self.k}_g{self.g}"


@dataclass(frozen=True)
class RouteHidden:
    """`t` tokens of `h` channels choosing as in `Route`, by the product with `e` vectors."""

    t: int
    e: int = EXPERTS
    k: int = TOP_K
    h: int = HIDDEN
    g: int = GROUPS
    top_groups: int = TOP_GROUPS

    @property
    def name(self) -> str:
        return f"t{self.t}_e{self.e}_k{self.k}_h{self.h}"


@dataclass(frozen=True)
class Moe:
    """`t` tokens of `h` channels through `k` of `e` experts of width `i` each."""

    t: int
    e: int = EXPERTS
    k: int = TOP_K
    h: int = HIDDEN
    i: int = EXPERT_WIDTH

    @property
    def name(self) -> str:
        return f"t{self.t}_e{self.e}_k{self.k}_h{self.h}_i{self.i}"


@dataclass(frozen=True)
class Decode:
    """`b` requests of context `s`, each adding `q` tokens, seen by `h` heads through pages of `page` tokens.

    With `varied` the contexts are spread evenly over 1 to `s`, as in a server that has been up for a while. `uneven`
    are the contexts themselves, the longest of which is `s`.
    """

    b: int
    s: int
    q: int = 1
    h: int = HEADS
    page: int = 64
    varied: bool = False
    uneven: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        spread = "_varied" if self.varied else "_uneven" if self.uneven else ""
        return f"b{self.b}_s{self.s}_q{self.q}_h{self.h}{spread}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Context of each request, its new tokens included."""
        if self.uneven:
            return self.uneven
        if not self.varied:
            return (self.s,) * self.b
        draw = random.Random(self.name)
        return tuple(draw.randint(self.q, self.s) for _ in range(self.b))

    @property
    def pages(self) -> int:
        """Entries of a request's row of the block table."""
        return -(-self.s // self.page)


@dataclass(frozen=True)
class SharedPrefix:
    """`b` requests that begin with the same `prefix` tokens, of `own` more each, one of them new; `h` heads."""

    b: int
    prefix: int
    own: int
    h: int = HEADS
    page: int = 64

    @property
    def name(self) -> str:
        return f"b{self.b}_prefix{self.prefix}_own{self.own}_h{self.h}"


@dataclass(frozen=True)
class Prefill:
    """`b` packed sequences of `s` tokens each and `h` heads, causal."""

    b: int
    s: int
    h: int = HEADS

    @property
    def name(self) -> str:
        return f"b{self.b}_s{self.s}_h{self.h}"


@dataclass(frozen=True)
class PackedPrefill:
    """`t` tokens in packed sequences of mixed lengths, `mean` on average, and `h` heads, causal."""

    t: int
    mean: int = 1000
    h: int = HEADS

    @property
    def name(self) -> str:
        return f"t{self.t}_mean{self.mean}_h{self.h}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence: anything from 1 to twice the mean alike; the last one is what is left."""
        draw, lengths, left = random.Random(f"t{self.t}_mean{self.mean}"), [], self.t
        while left:
            lengths.append(min(left, draw.randint(1, 2 * self.mean - 1)))
            left -= lengths[-1]
        return tuple(lengths)


@dataclass(frozen=True)
class ChunkedPrefill:
    """`b` requests, each adding `q` tokens to a cache that then holds `s`, and `h` heads."""

    b: int
    s: int
    q: int
    h: int = HEADS
    page: int = 64

    @property
    def name(self) -> str:
        return f"b{self.b}_s{self.s}_q{self.q}_h{self.h}"

    @property
    def pages(self) -> int:
        """Entries of a request's row of the block table."""
        return -(-self.s // self.page)


@dataclass(frozen=True)
class Tokens:
    """`t` tokens of `h` heads (0 where heads play no part), handled one by one."""

    t: int
    h: int = 0

    @property
    def name(self) -> str:
        return f"t{self.t}" + (f"_h{self.h}" if self.h else "")


MODEL_V3_SLICE = "v3-slice"  # DeepSeek-V3's dimensions: one dense layer and two of 256 experts
# Moonlight's dimensions, four layers of its 27, and of V2-Lite's vocabulary a share that leaves the head the 9% of a
# step that it has in the whole.
MODEL_TRAINED_SLICE = "trained-slice"
MODEL_V3_HALF = "v3-half"  # half of DeepSeek-V3's dimensions: one dense layer and three of 256 experts
MODEL_TINY = "tiny"
MODEL_DEMO = "demo"  # what `make demo` trains


@dataclass(frozen=True)
class ModelDecode:
    """A decode step of a whole model: `b` sequences of context `s`, the new token of each included."""

    model: str
    b: int
    s: int
    page: int = 64

    @property
    def name(self) -> str:
        return f"{self.model}_b{self.b}_s{self.s}"

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.b

    @property
    def pages(self) -> int:
        """Entries of a sequence's row of the block table."""
        return -(-self.s // self.page)


@dataclass(frozen=True)
class Training:
    """A step on `b` sequences of `s` tokens."""

    model: str
    b: int
    s: int

    @property
    def name(self) -> str:
        return f"{self.model}_b{self.b}_s{self.s}"


@dataclass(frozen=True)
class ModelPrefill:
    """A prompt of `s` tokens through a whole model."""

    model: str
    s: int
    page: int = 64
    b: int = 1

    @property
    def name(self) -> str:
        return f"{self.model}_s{self.s}"

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.s

    @property
    def pages(self) -> int:
        """Entries of the row of the block table."""
        return -(-self.s // self.page)


@dataclass(frozen=True)
class Generation:
    """`n` new tokens behind each of as many prompts, `b` at a time, with `drafts` drafted tokens a step."""

    model: str
    dtype: str
    b: int
    prompts: int
    n: int
    drafts: int = 0

    @property
    def name(self) -> str:
        draft = f"_draft{self.drafts}" if self.drafts else ""
        return f"{self.model}_{self.dtype}_b{self.b}_p{self.prompts}_n{self.n}{draft}"


# The linears of one layer, (N, K). Attention: the joint down-projection of q and kv, the up-projections, the output.
# A routed (and the shared) expert: gate and up together, and down.
Q_AND_KV_DOWN = (2112, 7168)
KV_DOWN = (576, 7168)
Q_UP = (24576, 1536)
KV_UP = (32768, 512)
ATTENTION_OUT = (7168, 16384)
EXPERT_GATE_UP = (4096, 7168)
EXPERT_DOWN = (7168, 2048)
LINEARS = (EXPERT_GATE_UP, EXPERT_DOWN, Q_UP, KV_UP, ATTENTION_OUT, Q_AND_KV_DOWN, KV_DOWN)
EXPERT_LINEARS = (EXPERT_GATE_UP, EXPERT_DOWN)

# A training or prefill batch, and the small ones of decoding.
GEMMS = tuple(Gemm(m, n, k) for m, (n, k) in product((4096, 128, 64, 1), LINEARS))
LINEAR_LAYERS = tuple(Gemm(4096, n, k) for n, k in EXPERT_LINEARS)

# Experts spread over 64, 32 and 8 GPUs: 4, 8 and 32 on each.
GROUPED = tuple(
    GroupedGemm(g, m, n, k) for (g, m), (n, k) in product(((4, 8192), (8, 4096), (32, 192)), EXPERT_LINEARS)
)
GROUPED_BF16 = tuple(GroupedGemm(8, 4096, n, k) for n, k in EXPERT_LINEARS)
MASKED = tuple(
    GroupedGemm(g, m, n, k)
    for (g, m), (n, k) in product(((1, 1024), (4, 256), (16, 64), (32, 64), (32, 16)), EXPERT_LINEARS)
)
GROUPED_WGRAD = tuple(GroupedGemm(g, m, n, k) for (g, m), (n, k) in product(((4, 8192), (8, 4096)), EXPERT_LINEARS))
GROUPED_ROWS = (GroupedRows(8, 4096, HIDDEN),)

ACTIVATIONS = (Rows(4096, HIDDEN), Rows(128, HIDDEN))
WEIGHTS = (Rows(*EXPERT_GATE_UP), Rows(*ATTENTION_OUT))
GATED = (Rows(4096, EXPERT_WIDTH), Rows(32768, EXPERT_WIDTH), Rows(128, EXPERT_WIDTH))

ROUTES = (
    *(Route(t) for t in (1, 128, 4096, 8192, 32768)),
    Route(8192, g=1, top_groups=1),
    Route(4096, e=160, k=6, g=8, top_groups=3, score="softmax"),  # DeepSeek-V2
)
ROUTE_GRADIENTS = tuple(Route(t) for t in (4096, 8192, 32768))
ROUTES_HIDDEN = tuple(RouteHidden(t) for t in (1, 128, 8192))
PERMUTES = (Moe(128), Moe(4096), Moe(8192))
EXPERT_BLOCKS = (Moe(128), Moe(2048), Moe(8192))
SHARED_EXPERT_BLOCKS = (Moe(128), Moe(8192))
EXPERT_TRAINING = (Moe(4096, e=32),)  # one of 8 GPUs, its share of the tokens' choices

DECODES = (
    Decode(128, 4096),
    Decode(128, 4096, q=2),
    Decode(64, 8192),
    Decode(16, 16384),
    Decode(1, 32768),
    Decode(128, 4096, h=64),
    Decode(128, 4096, h=16),
    Decode(128, 4096, varied=True),
    Decode(4, 45118, q=4, h=16, uneven=(4641, 45118, 1730, 1696)),
)
FP8_DECODES = (Decode(128, 4096), Decode(128, 4096, h=64), Decode(128, 4096, h=16))
PREFILLS = (Prefill(1, 4096), Prefill(1, 8192), Prefill(4, 4096, h=16))
# Mixed lengths beside equal ones of about the same mean.
PACKED_PREFILLS = (PackedPrefill(32768), PackedPrefill(32768, h=16))
EQUAL_PREFILLS = (Prefill(32, 1024), Prefill(32, 1024, h=16))
CHUNKED_PREFILLS = (
    ChunkedPrefill(4, 8192, 1024, h=16),
    ChunkedPrefill(1, 32768, 4096),
    *(ChunkedPrefill(1, 32768, 64), ChunkedPrefill(16, 8192, 32, h=16)),  # turns of conversations
)
SHARED_PREFIXES = tuple(SharedPrefix(64, 8192, 512, h=h) for h in (16, HEADS))
WRITTEN_PREFIXES = (SharedPrefix(64, 8192, 512), SharedPrefix(128, 8192, 512), SharedPrefix(256, 2048, 512))
CACHE_WRITES = (Tokens(128), Tokens(4096), Tokens(65536))
DECODE_QUERIES = (*(Tokens(t, HEADS) for t in (1, 16, 64, 128)), Tokens(128, 16))
DECODE_VALUES = (Tokens(1, HEADS), Tokens(128, HEADS), Tokens(128, 16))
MERGES = (Tokens(128, HEADS), Tokens(4096, HEADS))

# Of a training step in one of the slices below, and of DeepSeek-V3's vocabulary.
LOGITS = (Rows(16384, 16384), Rows(4096, 129280))

TRAININGS = (Training(MODEL_TRAINED_SLICE, 4, 4096),)
# Moonlight has the shape of a 16B-A3B model.
MODEL_DECODES = (
    ModelDecode(MODEL_V3_SLICE, 32, 2048),
    ModelDecode(MODEL_V3_SLICE, 64, 4096),
    ModelDecode(MODEL_V3_SLICE, 1, 4096),
    ModelDecode("moonlight", 1, 1024),
    ModelDecode("moonlight", 128, 1024),
)
MODEL_PREFILLS = (ModelPrefill(MODEL_V3_SLICE, 4096),)
TRANSFORMERS_PREFILL = ModelPrefill(MODEL_V3_HALF, 4096)
TRANSFORMERS_DECODE = ModelDecode(MODEL_V3_HALF, 32, 2048)
DRAFTED = (
    Generation(MODEL_DEMO, "fp32", 1, 3, 256, 3),
    *(Generation(MODEL_DEMO, "bf16", 1, 3, 256, drafts) for drafts in (1, 2, 3, 4)),
)
IN_ANY_COMPANY = (Generation(MODEL_DEMO, "bf16", 16, 32, 64),)
