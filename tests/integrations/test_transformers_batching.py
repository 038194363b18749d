"""transformers' continuous batching over paged latents, which it does not do by itself for latent attention."""

import contextlib
import inspect

import pytest
import torch
from tiny_models import tiny_model

transformers = pytest.importorskip("transformers", minversion="5.17")
from transformers.generation import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching import cache as cb_cache  # noqa: E402
from transformers.generation.continuous_batching import continuous_api  # noqa: E402

from dskernels.integrations.transformers import accelerate  # noqa: E402

transformers.logging.set_verbosity_error()
NEW = 5
SIZE = "block_size" if "block_size" in inspect.signature(ContinuousBatchingConfig).parameters else "page_size"


@pytest.fixture(autouse=True)
def cpu_memory(monkeypatch):
    """It asks a GPU for its memory; without one it is told of a GiB."""
    if not torch.cuda.is_available():
        answer = torch.device("cpu"), 2**30, 0, 0
        monkeypatch.setattr(cb_cache, "get_device_and_memory_breakdown", lambda *args, **kwargs: answer)


def generation(**options):
    return transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0, **options
    )


def batched(model, prompts, config, **sizes):
    sizes = ContinuousBatchingConfig(**{SIZE: 16, "num_blocks": 40, "max_batch_tokens": 256, **sizes})
    results = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=sizes, progress_bar=False
    )
    assert [result.error for result in results.values()] == [None] * len(results)
    return [result.generated_tokens for result in results.values()]


@pytest.mark.parametrize("family", ["V3", "V2-Lite"])
def test_generate_batch(family):
    """Prompts of many lengths, in pieces of at most 24 tokens beside steps, a prefix shared; token for token."""
    model = tiny_model(family)
    torch.manual_seed(3)
    prompts = [torch.randint(1, 257, (n,)).tolist() for n in (5, 40, 17, 1)]
    prompts.append([*prompts[1][:32], 5, 6])
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=generation())[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    before = continuous_api.PagedAttentionCache, vars(continuous_api.ContinuousBatchingManager).copy()
    with accelerate(model, verbose=False):
        if family == "V3":
            assert batched(model, prompts, generation()) == expected
        assert batched(model, prompts, generation(), num_blocks=12, max_batch_tokens=24) == expected
        assert model.config._attn_implementation == "dskernels"
    assert (continuous_api.PagedAttentionCache, vars(continuous_api.ContinuousBatchingManager).copy()) == before


def test_forks():
    """Several texts of one prompt: blocks are shared or copied. Of the most probable token there is but one text."""
    model = tiny_model("V3")
    prompt = torch.randint(1, 257, (21,)).tolist()
    expected = model.generate(torch.tensor([prompt]), generation_config=generation())[0, 21:].tolist()
    config = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=True, top_k=1, num_return_sequences=3, eos_token_id=-1, pad_token_id=0
    )
    sizes = ContinuousBatchingConfig(**{SIZE: 16, "num_blocks": 40, "max_batch_tokens": 256})
    with (
        accelerate(model, verbose=False),
        model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=sizes, block=True, timeout=5
        ) as manager,
    ):
        manager.add_request(prompt, max_new_tokens=NEW)
        results = [manager.get_result(timeout=30) for _ in range(3)]
    assert [result.generated_tokens for result in results] == [expected] * 3


def test_other_models_are_left_alone():
    """While a model is accelerated, others get what they got before."""
    from dskernels.integrations.transformers.paged import latent_paged_cache

    seen = []
    config = tiny_model("GLM-4.5").config
    latent_paged_cache(lambda *args, **kwargs: seen.append(kwargs["config"]), config=config)
    assert seen[0] is config
    with contextlib.suppress(AttributeError):
        assert config._attn_implementation == "sdpa"
