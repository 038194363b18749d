"""Small random models whose every part matters: no weight drowns, no norm and no bias is trivial."""

import torch

from dskernels.model import Config, DeepseekV3
from dskernels.model.data import BOUNDARY, Corpus

# Changes of the preset "tiny" for tests that make thousands of passes: one dense block, one of few experts.
SMALL = {
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
}


def small_corpus():
    """Four documents of bytes, one of them held out."""
    text = torch.tensor(list(b"for i in range(10):\n    print(i)\n" * 6), dtype=torch.int16)
    boundary = torch.tensor([BOUNDARY], dtype=torch.int16)
    documents = [torch.cat((boundary, text[i:], boundary)) for i in range(4)]
    return Corpus(documents[1:], documents[:1])


def randomize(model):
    """Norms around 1, router biases around 0, matrices five times larger than a fresh model's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.1)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(0.0, 0.3)
    return model


def tiny_model(config=None, **changes):
    """A random model of the preset "tiny" with some fields changed, in fp32."""
    return randomize(DeepseekV3(config or Config.from_name("tiny", **changes)))


def echo_model(context, **changes):
    """The next token is a function of the last, which the MTP module knows, plus `context` times what the blocks add.

    With no context drafts always stand, with much they stand by chance.
    """
    model = tiny_model(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "w2.weight", "experts.w2")):
                parameter.mul_(context)
            elif "norm" in name:
                parameter.fill_(1.0)
        hidden = model.config.hidden_size
        for module in model.mtp:
            module.eh_proj.weight.copy_(torch.eye(hidden, 2 * hidden))  # the embedding, not the hidden state
    return model


def packed(*sequences):
    """Tokens one after the other, and where each sequence begins."""
    cu_seqlens = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0).int()
    return torch.cat([torch.as_tensor(s) for s in sequences]), cu_seqlens


def random_prompts(*lengths, vocab_size=257):
    """Prompts of random tokens."""
    return [torch.randint(0, vocab_size, (n,)).tolist() for n in lengths]
