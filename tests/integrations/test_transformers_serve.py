"""transformers' own server with an accelerated model, asked by the official client of OpenAI's interface."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

transformers = pytest.importorskip("transformers", minversion="5.17")
openai = pytest.importorskip("openai", reason="the extra transformers[serving] is not installed")
pytest.importorskip("fastapi", reason="the extra transformers[serving] is not installed")
pytest.importorskip("uvicorn", reason="the extra transformers[serving] is not installed")
pytest.importorskip("accelerate", reason="the extra transformers[serving] is not installed")

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "def route(self, token): return"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a tokenizer of bytes and a chat template."""
    import tokenizers

    path = tmp_path_factory.mktemp("served")
    model = tiny_model("V3", vocab_size=300)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, do_sample=False)
    model.save_pretrained(path)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["def route(self, token):\n    return self.gate(token)\n" * 20], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("options", [[], ["--continuous-batching"]], ids=["generate", "continuous batching"])
def test_chat(folder, tmp_path, options):
    """What the server answers is what the unchanged model generates."""
    if options and not torch.cuda.is_available() and transformers.__version__.startswith("5.17"):
        pytest.skip("continuous batching of transformers 5.17 asks for a GPU's memory")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dskernels.integrations.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as server,
    ):
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
            answer = ask(client, str(folder), server, log)
        finally:
            server.terminate()
    assert "latent attention" in log.read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == tokenizer.decode(tokens, skip_special_tokens=True)


def ask(client, model, server, log):
    """The answer to one question, once the server listens."""
    for _ in range(600):
        if server.poll() is not None:
            pytest.fail(f"the server has ended:\n{log.read_text()[-3000:]}")
        try:
            stream = client.chat.completions.create(
                model=model, messages=MESSAGES, max_tokens=12, temperature=0.0, stream=True
            )
            return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
        except openai.APIConnectionError:
            time.sleep(0.2)
        except openai.InternalServerError:
            time.sleep(0.2)
    pytest.fail(f"the server does not answer:\n{log.read_text()[-3000:]}")
