"""A random model in a folder as others publish theirs: a tokenizer trained here, its settings, a chat template."""

import json

import torch

from dskernels.model import Config, DeepseekV3, save

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<user>", "<assistant>", "<system>"]
SOURCE = (
    "def f(x):\n    return x + 1\n\nclass Expert:\n    def route(self, token):\n        return self.gate(token)\n" * 20
)


def make_checkpoint(folder, *, template=TEMPLATE, seed=0, context=256, changes=None, **options):
    """Writes one; ``changes`` are to the preset "tiny", ``options`` are those of `save`."""
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    bpe.train_from_iterator([SOURCE], trainer)
    torch.manual_seed(seed)
    # Initial weights five times as large as the preset's, so that the text is not one token again and again.
    sizes = {"vocab_size": 300, "eos_token_id": (1,), "max_position_embeddings": context, "initializer_range": 0.1}
    save(DeepseekV3(Config.from_name("tiny", **{**sizes, **(changes or {})})), folder, **options)
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": "<bos>"},
        "eos_token": "<eos>",
        **({} if template is None else {"chat_template": template}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
