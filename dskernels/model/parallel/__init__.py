"""More than one GPU, on torch.distributed: expert parallelism and what is built on it."""

from dskernels.model.parallel.expert import ExpertParallel

__all__ = ["ExpertParallel"]
