"""The quick way through `check_fp8` lets nothing pass that the whole check refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import validate
from dskernels.types import Fp8Tensor

BLOCKS = ((1, 128), (128, 128), (128, 1))
META, CPU = torch.device("meta"), torch.device("cpu")


def strided(sizes, strides, dtype, device):
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device)


@st.composite
def operands(draw):
    """An `Fp8Tensor` as `quantize` makes it, or with one or two things about it that are not so."""
    block = draw(st.sampled_from(BLOCKS))
    rows, cols = draw(st.sampled_from([0, 1, 3, 129])), draw(st.sampled_from([0, 1, 128, 300, 301]))
    whole = ds.quantize(torch.empty(rows, cols), block)
    data = {"sizes": list(whole.data.shape), "strides": list(whole.data.stride())}
    scale = {"sizes": list(whole.scale.shape), "strides": list(whole.scale.stride())}
    data |= {"dtype": torch.float8_e4m3fn, "device": CPU}
    scale |= {"dtype": torch.float32, "device": CPU}
    for _ in range(draw(st.integers(0, 2))):
        part = draw(st.sampled_from([data, scale]))
        match draw(st.sampled_from(["size", "stride", "stride", "stride", "dtype", "device", "dim", "block"])):
            case "size":
                part["sizes"][draw(st.integers(0, 1))] = draw(st.integers(0, 5))
            case "stride":
                part["strides"][draw(st.integers(0, 1))] = draw(st.sampled_from([0, 1, 2, 4, 6, 512]))
            case "dtype":
                part["dtype"] = draw(st.sampled_from([torch.uint8, torch.float16, torch.float8_e5m2]))
            case "device":
                part["device"] = META
            case "dim":
                part["sizes"], part["strides"] = [2, *part["sizes"]], [1024, *part["strides"]]
            case "block":
                block = draw(st.sampled_from([*BLOCKS, (64, 64)]))
        if len(data["sizes"]) == 3 or len(scale["sizes"]) == 3:
            break
    return Fp8Tensor(strided(**data), strided(**scale), block)


@settings(max_examples=1000)
@given(x=operands(), allowed=st.sampled_from([BLOCKS, BLOCKS[:1]]), like=st.sampled_from([None, CPU, META]))
def test_quick_accepts_only_what_the_whole_check_does(x, allowed, like):
    like = None if like is None else torch.empty(1, device=like)
    if validate._is_plain_fp8(x, allowed, 2, like):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(validate, "_is_plain_fp8", lambda *args: False)
            validate.check_fp8("x", x, blocks=allowed, like=like)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rows", [2, 300])
def test_quick_accepts_what_quantize_makes(block, rows):
    x = ds.quantize(torch.randn(rows, 384), block)
    assert validate._is_plain_fp8(x, BLOCKS, 2, x.data)


@pytest.mark.parametrize("change", [{"data": None}, {"scale": [1.0]}, {"data": 3}, {"scale": None}])
def test_what_is_no_tensor_is_named(change):
    x = ds.quantize(torch.randn(4, 128))._replace(**change)
    with pytest.raises(TypeError, match=rf"x\.{next(iter(change))}: expected a torch.Tensor"):
        validate.check_fp8("x", x, blocks=BLOCKS)


def test_a_tuple_is_not_an_fp8_tensor():
    with pytest.raises(TypeError, match=r"x: expected an Fp8Tensor .* got tuple"):
        validate.check_fp8("x", tuple(ds.quantize(torch.randn(4, 128))), blocks=BLOCKS)


@pytest.mark.parametrize("sizes", [(5, 300), (4, 300), (1, 300), (5, 128), (0, 300), (2, 5, 300)])
def test_scales_of_another_layout_are_taken(sizes):
    """What other libraries quantise has its scales row by row, or without room between the columns."""
    x = torch.randn(sizes)
    flat = ds.quantize(x.flatten(0, -2))
    data, scale = flat.data.view(sizes), flat.scale.contiguous().view(*sizes[:-1], flat.scale.shape[1])
    for other in (scale, scale.mT.contiguous().mT):
        taken = Fp8Tensor.of(data, other)
        validate.check_fp8("a", taken, blocks=[(1, 128)], ndim=len(sizes))
        assert torch.equal(taken.scale, scale)
    assert Fp8Tensor.of(flat.data, flat.scale).scale.data_ptr() == flat.scale.data_ptr()  # not copied without need
    weight = ds.quantize(torch.randn(130, 300), (128, 128))
    assert torch.equal(Fp8Tensor.of(weight.data, weight.scale.mT.contiguous().mT, (128, 128)).scale, weight.scale)


def test_a_tensor_that_has_lost_its_memory(device):
    """As FSDP leaves a weight between passes: its metadata stay, and a kernel would read at address 0."""
    x, weight = torch.randn(5, 256, device=device), torch.randn(128, 256, device=device)
    for _ in range(4):
        ds.quantize(x)
        ds.fp8_linear(x, weight)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight: expected a tensor with memory"):
        ds.fp8_linear(x, weight)
    quantized = ds.quantize(x)
    quantized.scale.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a\.scale: expected a tensor with memory"):
        ds.fp8_gemm(quantized, ds.quantize(x, (128, 128)))
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="x: expected a tensor with memory"):
        ds.quantize(x)


def test_a_nested_tensor_is_named(recwarn):
    with pytest.raises(TypeError, match="x: expected a strided tensor, got a nested one"):
        ds.quantize(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)]))
