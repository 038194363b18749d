"""CUDA C++ kernels, compiled at run time and launched on torch's current stream."""
