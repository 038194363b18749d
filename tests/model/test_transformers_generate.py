"""Generation against transformers: every logit that decided a token, whatever was batched, cut in pieces or shared."""

import pytest
import torch
from tiny import random_prompts, tiny_model

from dskernels.model import Yarn, generate, save

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

YARN = Yarn(factor=8.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
V2 = {"scoring_func": "softmax", "norm_topk_prob": False}
VARIANTS = {
    "V3": {},
    "V2": {**V2, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
    "no q_lora, yarn": {"q_lora_rank": None, "rope_scaling": YARN},
}
NEW = 8


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def case(request, tmp_path_factory):
    """Our model; prompts, most of which begin alike; transformers' texts after them, and its logits there."""
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(**request.param)
    save(model, folder)
    cls = transformers.DeepseekV2ForCausalLM if "scoring_func" in request.param else transformers.DeepseekV3ForCausalLM
    theirs = cls.from_pretrained(folder).eval()
    beginning = random_prompts(21)[0]
    prompts = [*(beginning + end for end in random_prompts(5, 1, 30)), *random_prompts(1, 47), beginning[:16]]
    texts, logits = [], []
    for prompt in prompts:
        text = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0]
        texts.append(text[len(prompt) :].tolist())
        with torch.no_grad():
            logits.append(theirs(text[None]).logits[0, len(prompt) - 1 : -1])
    return model, prompts, texts, logits


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_batch": 2}, {"prefill_tokens": 16}], ids=str)
def test_logits_and_texts(case, options, sharing):
    """Prompts and steps over the paged cache; each logit within 2e-5, of logits up to 3."""
    model, prompts, texts, expected = case
    generation = generate(model, prompts, max_new_tokens=NEW, page_size=8, prefix_sharing=sharing, eos=(), **options)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    got = [[] for _ in prompts]
    running = []
    for new in generation:
        given = [i for i, tokens in enumerate(new) if tokens]
        rows = running if set(given) == set(running) else given  # a step's rows, or those of prompts as they came
        for index, row in zip(rows, seen.pop(), strict=True):
            got[index].append(row)
        running = list(generation._running)
    handle.remove()
    assert generation.tokens == texts
    assert (generation.shared_tokens > 0) == sharing
    for logits, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.stack(logits), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sharing", [True, False])
def test_drafting(case, sharing):
    """The same texts, though the MTP module is as random as the rest."""
    model, prompts, texts, _ = case
    if not model.mtp:
        pytest.skip("transformers has no MTP module for V2")
    generation = generate(
        model, prompts, max_new_tokens=NEW, drafts=2, page_size=8, prefix_sharing=sharing, max_batch=4, eos=()
    )
    assert generation.finish() == texts
    assert (generation.shared_tokens > 0) == sharing
