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


def test_the_page_shows_the_recipe():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    body = re.compile(r'    """.*?    """\n', re.DOTALL)  # the page says in text what the docstring does
    source = body.sub("", inspect.getsource(prefix_sharing.decode_with_prefix))
    assert block.strip().endswith(source.strip())


def job(batch, q_tokens, heads, prefix_pages, suffix_lengths, page, dims, dtype, device):
    latent, rope = dims
    own = -(-max(suffix_lengths) // page)
    pages = torch.randperm(prefix_pages + batch * own).int().to(device)
    cache = torch.randn(len(pages), page, latent + rope, device=device).to(dtype)
    return {
        "q": torch.randn(batch, q_tokens, heads, latent + rope, device=device).to(dtype),
        "cache": cache,
        "prefix_table": pages[None, :prefix_pages],
        "prefix_length": torch.tensor([prefix_pages * page], dtype=torch.int32, device=device),
        "suffix_table": pages[prefix_pages:].view(batch, own),
        "suffix_lengths": torch.tensor(suffix_lengths, dtype=torch.int32, device=device),
    }


def whole(x, **options):
    """Each request with all of its pages."""
    table = torch.cat((x["prefix_table"].expand(len(x["q"]), -1), x["suffix_table"]), 1)
    return ds.mla_decode(x["q"], x["cache"], table, x["prefix_length"] + x["suffix_lengths"], **options)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("most_rows", [4096, 12, 1], ids=["one group", "groups", "a request each"])
def test_it_is_decode(device, monkeypatch, impl, most_rows):
    monkeypatch.setattr(prefix_sharing, "MOST_ROWS", most_rows)
    x = job(4, 2, 3, 2, [2, 9, 3, 6], 4, (32, 16), torch.float32, device)
    options = {"scale": 48**-0.5, "value_dim": 32}
    with ds.use_impl(impl):
        got, want = prefix_sharing.decode_with_prefix(**x, **options), whole(x, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "q_tokens", "heads"), [(64, 1, 16), (64, 1, 128), (6, 4, 16)])
def test_model_shapes(device, batch, q_tokens, heads):
    lengths = torch.randint(q_tokens, 200, (batch,)).tolist()
    x = job(batch, q_tokens, heads, 40, lengths, 64, (512, 64), torch.bfloat16, device)
    got, want = prefix_sharing.decode_with_prefix(**x, scale=576**-0.5), whole(x, scale=576**-0.5)
    assert parity.difference(got[0], want[0]) < 1e-5
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
