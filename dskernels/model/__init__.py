"""A DeepSeek-V3 model built on the library's operations: configuration, forward pass, checkpoints, generation."""

from dskernels.model.batch import Batch
from dskernels.model.cache import LatentCache
from dskernels.model.chat import ChatTemplate
from dskernels.model.checkpoint import load
from dskernels.model.config import Config, Yarn
from dskernels.model.fp8_weights import keep_in_fp8
from dskernels.model.generate import Generation, generate
from dskernels.model.model import DeepseekV3, Output
from dskernels.model.moe import RouterOutput
from dskernels.model.mtp import shift, targets
from dskernels.model.presets import PRESETS
from dskernels.model.sampling import Sampling
from dskernels.model.text import TextStep, TextStream, generate_text, stream_text
from dskernels.model.tokens import tokenizer_of
from dskernels.model.writing import save

__all__ = [
    "PRESETS",
    "Batch",
    "ChatTemplate",
    "Config",
    "DeepseekV3",
    "Generation",
    "LatentCache",
    "Output",
    "RouterOutput",
    "Sampling",
    "TextStep",
    "TextStream",
    "Yarn",
    "generate",
    "generate_text",
    "keep_in_fp8",
    "load",
    "save",
    "shift",
    "stream_text",
    "targets",
    "tokenizer_of",
]
