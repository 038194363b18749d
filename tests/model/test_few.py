"""What a pass over few tokens does in few launches: each operation against its meaning, and whole models."""

import pytest
import torch
from tiny import tiny_model

from compiling import Compile, assert_clean, compile_all
from dskernels.model import LatentCache, few, generate, layers
from dskernels.model.layers import FeedForward, Linear, RMSNorm
from dskernels.model.rope import Rope
from registering import check_registration

OPS = few._products, layers._add_norm, few._embed, few._look_ahead
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def close(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        if x.is_floating_point():
            bound = TOLERANCE[x.dtype]
            torch.testing.assert_close(x.float(), y.float(), rtol=bound, atol=bound)
        else:
            assert torch.equal(x, y)


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    torch.manual_seed(seed + sum(shape))
    return torch.randn(*shape).to(device, dtype)


def weight(n, k, dtype, device):
    return (draw(n, k) * k**-0.5).to(device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "n", "second", "k", "how"),
    [
        (1, 40, 24, 128, "update norm"),  # a query and a latent, of the stream
        (3, 17, None, 300, "norm normed update"),  # ragged, more than a block along K: the head
        (4, 33, None, 48, "gated"),
        (8, 16, None, 16, ""),
        (2, 40, None, 64, "norm strided"),
        (0, 16, None, 16, "norm"),
    ],
    ids=str,
)
def test_products(rows, n, second, k, how, dtype, device):
    options = {"dtype": dtype, "device": device}
    wide = 2 * k if "gated" in how or "strided" in how else k
    x = draw(rows, wide, **options)[:, : k if "strided" in how else wide]
    update = draw(rows, k, seed=1, **options) if "update" in how else None
    norm = 1 + 0.1 * draw(k, **options) if "norm" in how else None
    more = None if second is None else weight(second, k, dtype, device)
    args = (x, update, norm, weight(n, k, dtype, device), more, 1e-6, "gated" in how, "normed" in how)
    close(few._products(*args, impl="triton"), few._products(*args, impl="reference"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 128), (9, 100), (0, 16)])
def test_add_norm(shape, dtype, device):
    options = {"dtype": dtype, "device": device}
    args = draw(*shape, **options), draw(*shape, seed=1, **options), draw(shape[1], **options), 1e-6
    close(layers._add_norm(*args, impl="triton"), layers._add_norm(*args, impl="reference"))


def embedding_and_norms(dtype, device, rows, vocabulary=37, width=40):
    frequencies = torch.tensor([1.0, 0.1, 0.01], device=device)
    hidden, norms = draw(rows, width, dtype=dtype, device=device), [draw(width, dtype=dtype, device=device)] * 2
    return draw(vocabulary, width, dtype=dtype, device=device), frequencies, 1.25, hidden, *norms, 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("beside", [False, True])
def test_embed(beside, dtype, device):
    tokens, positions = torch.tensor([3, 36, 0], device=device), torch.tensor([0, 4000, 17], device=device)
    embedding, frequencies, scale, *norms, eps = embedding_and_norms(dtype, device, 3)
    args = tokens, positions, embedding, frequencies, scale, *(norms if beside else [None] * 3), eps
    close(few._embed(*args, impl="triton"), few._embed(*args, impl="reference"))


@pytest.mark.parametrize("vocabulary", [37, 5000])
def test_look_ahead(vocabulary, device):
    """Ties go to the first; a row without a sequence has length 0 and no slot."""
    lengths = torch.tensor([4, 0, 7], dtype=torch.int32, device=device)
    active = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    table = torch.arange(9, dtype=torch.int32, device=device).view(3, 3)
    logits = draw(3, vocabulary, device=device).round()
    results = []
    for impl in ("triton", "reference"):
        drafts = torch.full((3, 4), -1, device=device)
        given = embedding_and_norms(torch.float32, device, 3, vocabulary)
        results.append((drafts, *few._look_ahead(logits, drafts, 2, lengths, active, table, 4, *given, impl=impl)))
    close(*results)


def test_nothing_but_nan_is_a_token(device):
    drafts, ones = torch.full((1, 1), -1, device=device), torch.ones(1, dtype=torch.int32, device=device)
    logits, given = torch.full((1, 37), torch.nan, device=device), embedding_and_norms(torch.float32, device, 1)
    few._look_ahead(logits, drafts, 0, ones, ones, ones[None] - 1, 4, *given, impl="triton")
    assert drafts.item() == 0


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_registration(op, device):
    x, w, norm = draw(2, 16, device=device), draw(8, 16, device=device), draw(16, device=device)
    given = embedding_and_norms(torch.float32, device, 2)
    ones = torch.ones(2, dtype=torch.int32, device=device)
    tokens, table = torch.ones(2, dtype=torch.int64, device=device), torch.zeros(2, 3, dtype=torch.int32, device=device)
    arguments = {
        "few_products": (x, x.clone(), norm, w, w.clone(), 1e-6, False, True),
        "add_norm": (x, x.clone(), norm, 1e-6),
        "embed_tokens": (tokens, tokens + 1, *given),
        "look_ahead": (draw(2, 37, device=device), tokens[:, None].clone(), 0, ones, ones.clone(), table, 4, *given),
    }
    check_registration(op.overload, arguments[op.name])


@torch.no_grad()
def test_what_fits():
    layer = Linear(16, 8, fp8=False)
    assert few.fit(8, layer)
    assert not few.fit(9, layer)
    assert not few.fit(1, Linear(16, 8, fp8=True))
    assert not few.fit(1, Linear(1 << 12, 1 << 12, fp8=False))
    layer.register_forward_hook(lambda *_: None)
    assert not few.fit(1, layer)
    network = FeedForward(16, 8, fp8=False)
    assert few.fit(1, network)
    network.register_forward_hook(lambda *_: None)
    assert not few.fit(1, network)
    with torch.enable_grad():
        assert not few.fit(1)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"hooks": True}], ids=str)
def test_a_model_does_the_same(changes, monkeypatch):
    """Passes over few tokens as over many; a hook that somebody waits for is called."""
    hooks = changes.pop("hooks", False)
    model = tiny_model(**changes)
    tokens = torch.randint(0, model.config.vocab_size, (6,))
    calls = []
    if hooks:
        model.layers[0].self_attn.kv_a_proj_with_mqa.register_forward_hook(lambda *_: calls.append(1))
    got = model(tokens, mtp=True)
    monkeypatch.setattr(few, "MOST_ROWS", 0)
    expected = model(tokens, mtp=True)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.mtp_logits[0], expected.mtp_logits[0], rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 * hooks


@torch.no_grad()
@pytest.mark.parametrize("drafts", [1, 3])
def test_generation_is_the_same(drafts, monkeypatch):
    model = tiny_model()
    prompts = [[5, 6, 7], [8, 9, 10, 11]]

    def texts():
        cache = LatentCache(model.config, pages=8, dtype=torch.float32)
        return generate(model, prompts, max_new_tokens=12, drafts=drafts, cache=cache, eos=()).finish()

    got = texts()
    monkeypatch.setattr(few, "MOST_ROWS", 0)
    assert got == texts()


def test_kernels_compile_without_spills():
    module = "dskernels.model.triton_few"
    pointers = dict.fromkeys(("p_x", "p_update", "p_norm", "p_weight", "p_second", "p_out", "p_stream"), "*bf16")
    numbers = dict.fromkeys(("rows", "K", "N", "N_second", "stride_x", "stride_update", "stride_weight"), "i32")
    flags = {"UPDATE": True, "NORM": True, "GATED": False, "NORMED": True, "BLOCK_K": 512, "PROGRAMMATIC": False}
    rest = {"p_normed": "*bf16", **numbers, "stride_second": "i32", "eps": "fp32"}
    tiles = [(1, 8, True), (4, 2, True), (8, 2, False)]
    reports = compile_all(
        Compile(
            f"{module}:products_kernel",
            {**pointers, **rest},
            {**flags, "ROWS": rows, "COLUMNS": columns, "WHOLE": whole},
            targets=("sm_90",),
        )
        for rows, columns, whole in tiles
    )
    assert_clean(reports, max_registers=255)


def test_the_norm_is_applied_once():
    """A second product of the same stream has nothing to add."""
    with torch.no_grad():
        x, update, norm, layer = draw(2, 16), draw(2, 16), RMSNorm(16, 1e-6), Linear(16, 8, fp8=False)
        layer.weight.copy_(draw(8, 16))
        unnormed = few.Unnormed(x, update, norm)
        first = unnormed.products(layer)
        assert torch.equal(unnormed.stream, x + update)
        assert torch.equal(unnormed.products(layer), first)


def test_angles_are_those_of_the_model(device):
    rope = Rope(tiny_model().config).to(device)
    tokens, positions = torch.tensor([1, 2], device=device), torch.tensor([5, 900], device=device)
    _, cos, sin = few.embed(tokens, positions, draw(9, 16, device=device), rope)
    torch.testing.assert_close((cos, sin), rope(positions), rtol=1e-6, atol=1e-6)
