"""More than one GPU, on torch.distributed: a plan of the ranks, applied to the model from outside."""

from dskernels.model.parallel.balance import Placement, even, move_experts, place_experts
from dskernels.model.parallel.decode import DecodeExperts, parallelize_decode
from dskernels.model.parallel.expert import ExpertParallel
from dskernels.model.parallel.overlap import overlapped
from dskernels.model.parallel.pipeline import Pipeline
from dskernels.model.parallel.plan import Plan, Team, parallelize
from dskernels.model.parallel.reading import load_divided
from dskernels.model.parallel.redundant import RedundantExperts
from dskernels.model.parallel.training import train

__all__ = [
    "DecodeExperts",
    "ExpertParallel",
    "Pipeline",
    "Placement",
    "Plan",
    "RedundantExperts",
    "Team",
    "even",
    "load_divided",
    "move_experts",
    "overlapped",
    "parallelize",
    "parallelize_decode",
    "place_experts",
    "train",
]
