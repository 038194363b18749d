"""Arrays of NumPy, JAX and CuPy in and out through DLPack: the same memory, nothing copied."""

import numpy as np
import pytest
import torch

import dskernels as ds


def test_numpy():
    """Views in, `out=` in place, views out."""
    x = np.random.default_rng(0).standard_normal((5, 256), dtype=np.float32)
    out = np.empty((5, 136), np.float32)
    weight = ds.quantize(torch.randn(136, 256), (128, 128))
    tensor = torch.from_dlpack(x)
    assert tensor.data_ptr() == x.ctypes.data
    returned = ds.fp8_gemm(ds.quantize(tensor), weight, out=torch.from_dlpack(out))
    assert returned.data_ptr() == out.ctypes.data
    np.testing.assert_array_equal(out, ds.fp8_gemm(ds.quantize(tensor), weight, out_dtype=torch.float32).numpy())
    routing = ds.route(torch.from_dlpack(x[:, :16].copy()), top_k=2)
    weights = np.from_dlpack(routing.weights)
    assert weights.ctypes.data == routing.weights.data_ptr()


def test_jax():
    jax = pytest.importorskip("jax")
    x = jax.numpy.arange(5 * 16, dtype="float32").reshape(5, 16)
    tensor = torch.from_dlpack(x)
    assert tensor.data_ptr() == x.unsafe_buffer_pointer()
    routing = ds.route(tensor, top_k=2)
    weights = jax.dlpack.from_dlpack(routing.weights.contiguous())
    assert weights.unsafe_buffer_pointer() == routing.weights.data_ptr()
    assert weights.shape == (5, 2)


@pytest.mark.gpu
def test_cupy_on_its_stream():
    """The kernel runs on the caller's stream: torch is told which, and nothing waits in between."""
    cupy = pytest.importorskip("cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        x = cupy.random.standard_normal((64, 256), dtype=cupy.float32)
        tensor = torch.from_dlpack(x)
        assert tensor.data_ptr() == x.data.ptr
        quantized = ds.quantize(tensor)
        scale = cupy.from_dlpack(quantized.scale)
        assert scale.data.ptr == quantized.scale.data_ptr()
    stream.synchronize()
    expected = ds.quantize(torch.from_dlpack(cupy.asnumpy(x)))
    np.testing.assert_array_equal(cupy.asnumpy(scale), expected.scale.numpy())
