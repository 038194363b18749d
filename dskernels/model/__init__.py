"""A DeepSeek-V3 model built of the library's operations: configuration, forward pass, checkpoints, generation."""

from dskernels.model.batch import Batch
from dskernels.model.cache import LatentCache
from dskernels.model.checkpoint import load, save
from dskernels.model.config import PRESETS, Config, Yarn
from dskernels.model.generate import Generation, generate
from dskernels.model.model import DeepseekV3, Output
from dskernels.model.moe import RouterOutput
from dskernels.model.mtp import shift, targets
from dskernels.model.sampling import Sampling

__all__ = [
    "PRESETS",
    "Batch",
    "Config",
    "DeepseekV3",
    "Generation",
    "LatentCache",
    "Output",
    "RouterOutput",
    "Sampling",
    "Yarn",
    "generate",
    "load",
    "save",
    "shift",
    "targets",
]
