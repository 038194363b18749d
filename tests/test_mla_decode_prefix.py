"""The recipe of docs/prefix_sharing.md: what the page shows is what runs, and it gives what decode gives."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import dskernels as ds
from benchmarks import prefix_sharing
from dskernels import parity

PAGE = Path(__file__).parent.parent / "docs" / "prefix_sharing.md"


def test_the_page_shows_the_recipes():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    body = re.compile(r'    """.*?    """\n', re.DOTALL)  # the page says in text what the docstring does
    recipes = prefix_sharing.decode_with_prefix, prefix_sharing.decode_with_written_prefix
    for block, recipe in zip(blocks, recipes, strict=True):
        assert block.strip().endswith(body.sub("", inspect.getsource(recipe)).strip())


def job(batch, q_tokens, heads, prefix_pages, suffix_lengths, page, dims, dtype, device):
    latent, rope = dims
    own = -(-max(suffix_lengths) // page)
    pages = torch.randperm(prefix_pages + batch * own).int().to(device)
    prefix, suffixes = pages[:prefix_pages].expand(batch, -1), pages[prefix_pages:].view(batch, own)
    return {
        "q": torch.randn(batch, q_tokens, heads, latent + rope, device=device).to(dtype),
        "cache": torch.randn(len(pages), page, latent + rope, device=device).to(dtype),
        "block_table": torch.cat((prefix, suffixes), 1),
        "lengths": torch.tensor([prefix_pages * page + n for n in suffix_lengths], dtype=torch.int32, device=device),
    }


def pieces_of(monkeypatch, x, prefix_pages, options, want):
    """How many requests each decode has that the recipe makes, which is to give `want`."""
    made, decode = [], ds.mla_decode

    def counted(q, *args, **options):
        made.append(len(q))
        return decode(q, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(ds, "mla_decode", counted)
        got = prefix_sharing.decode_with_prefix(**x, prefix_pages=prefix_pages, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return made


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("most_rows", "made"), [(4096, [1, 4]), (12, [2, 4]), (1, [4, 4])], ids=["one group", "groups", "a request each"]
)
def test_it_is_decode(device, monkeypatch, impl, most_rows, made):
    monkeypatch.setattr(prefix_sharing, "MOST_ROWS", most_rows)
    x = job(4, 2, 3, 2, [2, 9, 3, 6], 4, (32, 16), torch.float32, device)
    options = {"scale": 48**-0.5, "value_dim": 32}
    with ds.use_impl(impl):
        want = ds.mla_decode(**x, **options)
        assert pieces_of(monkeypatch, x, 2, options, want) == made


@pytest.mark.parametrize(
    ("q_tokens", "heads", "prefix_pages", "shares"),
    [(1, 64, 2, False), (1, 60, 2, False), (2, 24, 2, True), (1, 3, 0, False)],
)
def test_where_it_shares(device, monkeypatch, q_tokens, heads, prefix_pages, shares):
    """Rows that fill five sixths of their blocks of 64 are left alone, and so is what has nothing in common."""
    x = job(2, q_tokens, heads, prefix_pages, [3, 2], 4, (32, 16), torch.float32, device)
    options = {"scale": 48**-0.5, "value_dim": 32}
    with ds.use_impl("reference"):
        want = ds.mla_decode(**x, **options)
        assert pieces_of(monkeypatch, x, prefix_pages, options, want) == ([1, 2] if shares else [2])


@pytest.mark.parametrize("q_tokens", [1, 2])
def test_a_written_prefix(device, q_tokens):
    """Keys and values of the prefix give what its latents do."""
    latent, rope, nope, value, heads, page = 32, 16, 24, 40, 3, 4
    x = job(3, q_tokens, heads, 2, [2, 9, 5], page, (latent, rope), torch.float32, device)
    kv_b = torch.randn(heads, nope + value, latent, device=device) * latent**-0.5
    q = torch.randn(3, q_tokens, heads, nope + rope, device=device)
    x["q"] = torch.cat((torch.einsum("bqhn,hnl->bqhl", q[..., :nope], kv_b[:, :nope]), q[..., nope:]), -1)
    rows = x["cache"][x["block_table"][0, :2].long()].flatten(0, 1)
    k, v = torch.einsum("pl,hxl->phx", rows[:, :latent], kv_b).split((nope, value), -1)
    with ds.use_impl("reference"):
        latents, lse = ds.mla_decode(**x, scale=0.2, value_dim=latent)
        got = prefix_sharing.decode_with_written_prefix(
            q, x["q"], kv_b[:, nope:], k, rows[:, latent:], v, x["cache"], x["block_table"][:, 2:],
            x["lengths"] - 2 * page, scale=0.2,
        )  # fmt: skip
    want = torch.einsum("bqhl,hvl->bqhv", latents, kv_b[:, nope:]).flatten(0, 1)
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], lse.transpose(0, 1).flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "q_tokens", "heads"), [(64, 1, 16), (64, 1, 128), (6, 4, 24)])
def test_model_shapes(device, batch, q_tokens, heads):
    lengths = torch.randint(q_tokens, 200, (batch,)).tolist()
    x = job(batch, q_tokens, heads, 40, lengths, 64, (512, 64), torch.bfloat16, device)
    got = prefix_sharing.decode_with_prefix(**x, prefix_pages=40, scale=576**-0.5)
    want = ds.mla_decode(**x, scale=576**-0.5)
    assert parity.difference(got[0], want[0]) < 1e-5
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
