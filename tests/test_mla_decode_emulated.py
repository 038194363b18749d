"""Decode over the latent cache in CUDA C++, on the CPU: the kernels as they are, but for what is spelt in PTX.

Every function of the source that has PTX in it is taken out, and warpgroups.h has it in C++. What only a GPU decides
stays open: what happens when copies and products take their time, and how long they do.
"""

import ctypes
import functools
import math
import re
from dataclasses import replace

import pytest
import torch

from dskernels.cuda.compiler import source_of
from dskernels.mla.decode import hopper
from dskernels.mla.decode.config import BLOCK, SHARED, TMA, choose_hopper_config
from dskernels.parity.paging import paged_cache
from dskernels.validate import ceil_div
from emulating_cuda import compiled, has_compiler
from test_mla_decode import close, oracle

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")
FLAGS = ("-std=c++20", "-O1", "-w", "-fno-strict-aliasing", "-shared", "-fPIC")

# What warpgroups.h has not, as others that use it have it in their own way.
INSTRUCTIONS = """
inline void prefetch_map(const void*) {}
inline void clear_flag(int* flag) { *flag = 0; }
inline void raise_flag(int* flag) { *flag = 1; }
inline bool raised(const int* flag) { return *flag != 0; }
template <int THREADS> void handover_sync_apart(int id) { named_sync<THREADS>(id); }
"""
FUNCTION = re.compile(r"(?:template <[^>\n]*>\s*)?[^\n;#]*__device__ __forceinline__[^\n;]*?(\w+)\([^;{]*\)[^;{]*\{")
# Functions of which warpgroups.h cannot know, as they take types of the kernel's.
REWRITTEN = {
    "write_piece": "inline void write_piece(u32 at, const Piece& x) { memcpy(&shared<u8>(at), &x, sizeof x); }",
    "read_piece": "inline Piece read_piece(u32 at) { Piece x; memcpy(&x, &shared<u8>(at), sizeof x); return x; }",
    "at": "int2 at(int group) const { return {shared<int>(addr + group * 8), shared<int>(addr + group * 8 + 4)}; }",
    "set": "void set(int group, int row, int tile) const { shared<int>(addr + group * 8) = row; "
    "shared<int>(addr + group * 8 + 4) = tile; }",
}
LINES = [  # of plan_groups, which is otherwise kept
    (r'asm volatile\("ld.shared.b32[^;]*;" : "=r"\(x\) : "r"\((.*)\)\);', r"x = shared<int>(\1);"),
    (r'asm volatile\("st.shared.b32[^;]*;" ::"r"\((.*)\), "r"\(x\) : "memory"\);', r"shared<int>(\1) = x;"),
]
INTEGERS = {
    "mla_decode": "long long stride_page, long long stride_row, int stride_table, int pages, int page, int requests, "
    "int capacity, int q_tokens, int heads, int row_blocks, int box_rows, float scale",
    "combine": "int requests, int q_tokens, int heads, int row_blocks, int parts",
}
POINTERS = {
    "mla_decode": "TensorMap* q, TensorMap* k, u8* cache, int* table, int* lengths, int* q_lengths, Element* out, "
    "float* lse, float* work",
    "combine": "float* work, Element* out, float* lse",
}


def without_ptx(text):
    """The source, without what warpgroups.h has."""
    for pattern, line in LINES:
        text = re.sub(pattern, line, text)
    start = text.find("#define REGISTERS_4 ")
    if start >= 0:  # the products' operands, spelt out
        text = text[:start] + text[text.index("// ---- around a product") :]
    text = re.sub(r"(?m)^typedef unsigned .*|^struct alignas\(64\) TensorMap .*", "", text)
    kept, at = [], 0
    for match in FUNCTION.finditer(text):
        if match.start() < at:
            continue
        end, depth = match.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if re.search(r"\basm\b", text[match.end() : end]):
            kept += [text[at : match.start()], REWRITTEN.get(match[1], "")]
            at = end
    text = "".join(kept) + text[at:]
    text = text.replace('extern "C" __global__', "__global__").replace("extern __shared__", "static")
    text = text.replace("__align__(1024) u8 smem[]", "u8 smem[1]")
    assert "asm" not in text
    return text


@functools.cache
def library(path, options, kernel, threads):
    defines = "".join(f"#define {name} {value}\n" for name, value in options)
    declared = f"{POINTERS[kernel]}, {INTEGERS[kernel]}"
    names = [parameter.split()[-1] for parameter in declared.split(", ")]
    maps = {"q": "*q", "k": "*k"} if kernel == "mla_decode" else {}
    call = ", ".join(maps.get(name, name) for name in names)
    entry = f'extern "C" void run(int blocks, {declared}) {{ launch(blocks, {threads}, [=] {{ {kernel}({call}); }}); }}'
    header = (hopper.SOURCE.parents[3] / "tests" / "warpgroups.h").read_text()
    return compiled("\n".join((defines, header, INSTRUCTIONS, without_ptx(source_of(path)), entry)), *FLAGS)


def call(library, blocks, *arguments):
    def argument(x):
        if x is None or isinstance(x, torch.Tensor):
            return ctypes.c_void_p(0 if x is None else x.data_ptr())
        return ctypes.c_float(x) if isinstance(x, float) else x

    library.run(ctypes.c_int(blocks), *map(argument, arguments))


def tensor_map(x, box_rows):
    strides = (stride * x.element_size() for stride in x.stride()[:2])
    return (ctypes.c_longlong * 16)(x.data_ptr(), *x.shape[:2], *strides, box_rows)


def decode(q, cache, table, lengths, new, scale, parts, wide):
    batch, q_tokens, heads, _ = q.shape
    row_blocks = ceil_div(q_tokens * heads, BLOCK)
    out, lse = q.new_full((batch, q_tokens, heads, 512), math.nan), torch.full((batch, heads, q_tokens), math.nan)
    work = torch.full((2 * parts * row_blocks * BLOCK * 513 + 4 * batch + parts * row_blocks + 3,), math.nan)
    config = choose_hopper_config(q_tokens * heads, cache.shape[1], cache.dtype == torch.uint8)
    config = replace(config, cluster=1)
    packed = q.view(batch, q_tokens * heads, 576)
    maps = tensor_map(packed, BLOCK), tensor_map(cache if config.loader == TMA else packed, config.box_rows)
    options = hopper.options_of(config, hopper.KINDS[q.dtype])
    attend = library(hopper.SOURCE, tuple(options.items()), "mla_decode", hopper.THREADS)
    row_bytes = [ctypes.c_longlong(stride * cache.element_size()) for stride in cache.stride()[:2]]
    shape = (table.stride(0), len(cache), cache.shape[1], batch, table.shape[1] * cache.shape[1])
    arguments = (*maps, cache, table, lengths, new, out, lse, work, *row_bytes, *shape, q_tokens, heads, row_blocks)
    call(attend, parts * row_blocks, *arguments, config.box_rows, scale * hopper.LOG2_E)
    options = (("OUT", hopper.KINDS[q.dtype]), ("WIDE", wide))
    join = library(hopper.COMBINE, options, "combine", 32 * hopper.COMBINE_WARPS)
    blocks = min(batch, parts) * row_blocks * 4 * (2 * wide)
    call(join, blocks, work, out, lse, batch, q_tokens, heads, row_blocks, parts)
    return out, lse


@pytest.mark.parametrize(
    ("lengths", "q_tokens", "heads", "page_size", "parts", "options"),
    [
        ([1000], 1, 16, 64, 3, {"wide": 8}),  # one request for all parts: the first ends between two blocks of a pair
        ([64, 330, 200, 1], 1, 70, 16, 5, {}),  # pages of fewer rows; two row blocks, the second mostly empty
        ([300, 2, 65], 3, 40, 64, 2, {"new": [3, 3, 1]}),  # more new tokens than positions; padding
        ([90, 330], 2, 9, 5, 4, {"dtype": torch.float16}),  # row by row
        ([330, 0, 90], 2, 16, 64, 4, {"cache_dtype": torch.uint8, "new": [1, 2, 2]}),
    ],
)
def test_against_fp64(lengths, q_tokens, heads, page_size, parts, options):
    dtype, new = options.get("dtype", torch.bfloat16), options.get("new")
    q = (torch.randn(len(lengths), q_tokens, heads, 576) * 8).to(dtype)
    cache = paged_cache(0, lengths, page_size, 512, 64, options.get("cache_dtype", dtype), "cpu", scale=0.1)
    new = None if new is None else torch.tensor(new, dtype=torch.int32)
    got = decode(q, *cache, new, 576**-0.5, parts, options.get("wide", 1))
    close(got, oracle(q, *cache, impl="hopper", scale=576**-0.5, value_dim=512, q_lengths=new), dtype)


def test_lengths_and_pages_of_any_value():
    cache = (torch.randn(3, 16, 576) * 0.1).bfloat16()
    table = torch.tensor([[0, -7], [2, 2147483647], [-2147483648, 1]], dtype=torch.int32)
    lengths = torch.tensor([2147483647, -5, 18], dtype=torch.int32)
    new = torch.tensor([2147483647, 2, -1], dtype=torch.int32)
    q = torch.randn(3, 2, 5, 576).bfloat16()
    got = decode(q, cache, table, lengths, new, 0.04, 2, 1)
    close(got, oracle(q, cache, table, lengths, impl="hopper", scale=0.04, value_dim=512, q_lengths=new), q.dtype)


def test_shared_memory_is_as_large_as_the_launcher_says():
    sizes = dict(re.findall(r"(OFFSET_\w+) = ([^,;]*)", source_of(hopper.SOURCE)))
    values = {"ROWS": 9 * 64 * 128, "TILE": 64 * 128, "BLOCK": 64}
    for name, expression in sizes.items():
        values[name] = eval(expression, {}, values)
    assert values["OFFSET_BARRIERS"] + 18 * 8 == SHARED
