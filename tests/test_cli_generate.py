"""``dskernels generate`` as a user meets it: continuing, talking, files of prompts, and all that can be wrong."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dskernels import cli
from dskernels.model import ChatTemplate, Config, DeepseekV3, generate, load, save, tokenizer_of
from tiny_checkpoint import TEMPLATE, make_checkpoint

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """With everything, in fp8, and without chat template and MTP module."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint(folder / "chat", shard_size=500_000)
    make_checkpoint(folder / "fp8", fp8=True)
    make_checkpoint(folder / "base", template=None, changes={"num_nextn_predict_layers": 0})
    return folder


@pytest.fixture
def here(checkpoints, tmp_path, monkeypatch):
    """An empty folder with a checkpoint beside it that a test may spoil."""
    shutil.copytree(checkpoints, tmp_path / "c")
    monkeypatch.chdir(tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments, stdin=None, terminal=False):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["dskernels", *map(str, arguments)])
        stream = io.StringIO(stdin or "")
        stream.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdin", stream)
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = exit_.code or 0
        return status, *capsys.readouterr()

    return run


def expected(folder, ids, count, **options):
    """The text that greedy generation gives."""
    model = load(folder, **options)
    return tokenizer_of(folder, model.config).decode(generate(model, [ids], max_new_tokens=count).finish()[0])


def test_a_text_is_continued(here, run):
    status, out, error = run("generate", "chat", "--prompt", "def ", "--max-new-tokens", 20)
    assert status == 0, error
    ids = tokenizer_of("chat", load("chat").config).encode("def ")
    assert ids[0] == 0  # tokenizer_config.json asks for <bos>
    assert out == "def " + expected("chat", ids, 20) + "\n"
    assert "20 tokens, " in error
    assert "tokens/s" in error
    assert run("generate", "chat", "--max-new-tokens", 20, stdin="def \n")[1] == out


def test_drafting_says_the_same_and_how_much_was_accepted(here, run):
    plain = run("generate", "chat", "--prompt", "def ", "--max-new-tokens", 20)
    status, out, error = run("generate", "chat", "--prompt", "def ", "--max-new-tokens", 20, "--draft", 2)
    assert status == 0, error
    assert out == plain[1]
    assert "drafted tokens accepted" in error


def test_fp8_checkpoints_run_in_fp8(here, run):
    """By default, and not if told so."""
    arguments = ("generate", "fp8", "--prompt", "def ", "--max-new-tokens", 8)
    ids = tokenizer_of("fp8", load("fp8").config).encode("def ")
    assert run(*arguments)[1] == "def " + expected("fp8", ids, 8, fp8=True) + "\n"
    assert run(*arguments, "--no-fp8")[1] == "def " + expected("fp8", ids, 8) + "\n"


def test_a_type_to_compute_in(here, run):
    status, out, error = run("generate", "chat", "--prompt", "def ", "--max-new-tokens", 4, "--dtype", "bf16")
    assert status == 0, error
    ids = tokenizer_of("chat", load("chat").config).encode("def ")
    assert out == "def " + expected("chat", ids, 4, dtype=torch.bfloat16) + "\n"
    status, _, error = run("generate", "chat", "--prompt", "def ", "--dtype", "int8")
    assert status == 1
    assert "--dtype: expected one of bf16, fp16, fp32, got int8" in error


def test_sampling_repeats_with_its_seed(here, run):
    arguments = ("generate", "chat", "--prompt", "def ", "--max-new-tokens", 12, "--temperature", 1, "--top-p", 0.95)
    texts = [run(*arguments, "--top-k", 50, "--min-p", 0.01, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    # Each line of a file has a seed of its own, the first one that of a single text.
    (here / "prompts.txt").write_text("def \ndef ")
    _, out, _ = run(
        "generate", "chat", "--batch", "prompts.txt", *arguments[4:], "--top-k", 50, "--min-p", 0.01, "--seed", 1
    )
    lines = [json.loads(line)["text"] for line in out.splitlines()]
    assert ["def " + line + "\n" for line in lines] == [texts[0], texts[2]]


def test_a_stop_string_ends_the_text_before_it(here, run):
    text = run("generate", "chat", "--prompt", "def ", "--max-new-tokens", 20)[1][len("def ") : -1]
    stop = text[5:8]
    status, out, error = run(
        "generate", "chat", "--prompt", "def ", "--max-new-tokens", 20, "--stop", stop, "--stop", "zzz"
    )
    assert status == 0, error
    assert out == "def " + text[: text.index(stop)] + "\n"


@pytest.mark.parametrize("system", [None, "Be short."])
def test_one_turn_of_a_conversation(here, run, system):
    """The template's tokens and no second <bos>; the answer alone is printed."""
    options = () if system is None else ("--system", system)
    status, out, error = run("generate", "chat", "--chat", *options, "--prompt", "Hi", "--max-new-tokens", 8)
    assert status == 0, error
    rendered = "<bos>" + ("" if system is None else f"<system>{system}") + "<user>Hi<assistant>"
    ids = tokenizer_of("chat", load("chat").config).encode(rendered, special=False)
    assert out == expected("chat", ids, 8) + "\n"
    assert run("generate", "chat", "--chat", *options, "--max-new-tokens", 8, stdin="Hi\n")[1] == out


def test_a_conversation_in_a_terminal(here, run, monkeypatch):
    """Each turn sees the ones before; an empty line is none; a context that is full is said and not the end."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    seen = []
    render = ChatTemplate.render

    def spy(self, messages, **options):
        seen.append([message["content"] for message in messages])
        return render(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", spy)
    said = iter(["one", "", "word " * 300, "two"])

    def ask(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    status, out, error = run("generate", "chat", "--chat", "--max-new-tokens", 4, terminal=True)
    assert status == 0, error
    assert [turn[0] for turn in seen] == ["one"] * 3
    assert [len(turn) for turn in seen] == [1, 3, 3]
    assert seen[2][2] == "two"
    assert "the context is 256" in error
    assert error.count("tokens/s") == 2


def test_a_file_of_prompts(here, run):
    """One a line; what comes out is JSON in the same order, the same as one by one."""
    (here / "prompts.txt").write_text("def \n\nclass Expert:\nreturn")
    status, out, error = run("generate", "chat", "--batch", "prompts.txt", "--max-new-tokens", 12, "--max-batch", 2)
    assert status == 0, error
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["def ", "class Expert:", "return"]
    for line in lines:
        alone = run("generate", "chat", "--prompt", line["prompt"], "--max-new-tokens", 12)[1]
        assert line["prompt"] + line["text"] + "\n" == alone
        assert line["finish_reason"] in ("length", "stop")
        assert (line["finish_reason"] == "length") == (line["tokens"] == 12)
    assert "3 prompts, " in error
    assert (
        run("generate", "chat", "--batch", "-", "--max-new-tokens", 12, stdin="def \n\nclass Expert:\nreturn")[1] == out
    )
    status, printed, _ = run(
        "generate", "chat", "--batch", "prompts.txt", "--max-new-tokens", 12, "--out", "texts.jsonl", "--draft", 1
    )
    assert (status, printed) == (0, "")
    assert (here / "texts.jsonl").read_text() == out


def test_a_file_of_json(here, run):
    """Prompts and conversations side by side; other fields are handed on."""
    lines = [{"id": 7, "prompt": "a\nb"}, {"messages": [{"role": "user", "content": "Hi"}], "tag": "ü"}]
    (here / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    status, out, error = run("generate", "chat", "--batch", "prompts.jsonl", "--max-new-tokens", 6)
    assert status == 0, error
    answers = [json.loads(line) for line in out.splitlines()]
    for line, answer in zip(lines, answers, strict=True):
        assert line.items() <= answer.items()
    hi = run("generate", "chat", "--chat", "--prompt", "Hi", "--max-new-tokens", 6)[1]
    assert answers[1]["text"] + "\n" == hi
    # With --chat a prompt is what somebody says.
    (here / "prompts.jsonl").write_text('{"prompt": "Hi"}')
    out = run("generate", "chat", "--chat", "--batch", "prompts.jsonl", "--max-new-tokens", 6)[1]
    assert json.loads(out)["text"] + "\n" == hi
    (here / "prompts.jsonl").write_text("\n")
    assert run("generate", "chat", "--batch", "prompts.jsonl")[:2] == (0, "")


def test_help_shows_examples(run):
    status, out, _ = run("generate", "--help")
    assert status == 0
    words = " ".join(out.split())
    assert 'dskernels generate run --prompt "def " --max-new-tokens 60 --draft 1' in words
    assert '--stop "\\n\\n"' in words
    assert all(option in out for option in ("--chat", "--batch", "--stop", "--min-p", "--seed"))


# ---- what can be wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["owner/Model", "--prompt", "x"], "hf download owner/Model --local-dir Model"),
        (["chat/config.json", "--prompt", "x"], "chat/config.json: a file, expected the folder of a checkpoint"),
        (["chat"], "--prompt: expected a text to continue"),
        (["chat", "--prompt", "x", "--batch", "p.txt"], "--prompt: expected without --batch"),
        (["chat", "--prompt", "x", "--out", "o"], "--out: expected with --batch"),
        (["chat", "--prompt", "x", "--max-new-tokens", 0], "--max-new-tokens: expected at least 1, got 0"),
        (["chat", "--prompt", "x", "--max-new-tokens", 300], "new ones, the model's context is 256"),
        (["chat", "--prompt", "x", "--draft", -1], "--draft: expected at least 0, got -1"),
        (["base", "--prompt", "x", "--draft", 1], "--draft: base has no MTP module"),
        (["chat", "--prompt", "x", "--temperature", -1], "temperature: expected 0 or more"),
        (["chat", "--prompt", "x", "--top-p", 1.5], "top_p: expected more than 0"),
        (["chat", "--prompt", "x", "--min-p", 2], "min_p: expected"),
        (["chat", "--prompt", "x", "--top-k", -1], "top_k: expected 0"),
        (["chat", "--prompt", "x", "--stop", ""], "stop: expected"),
        (["chat", "--prompt", "x", "--device", "cpu", "--graphs"], "--graphs: needs a GPU"),
        (["chat", "--prompt", "x", "--device", "abacus"], "--device: 'abacus' cannot be used"),
        (["chat", "--prompt", "x", "--device", "cuda:99"], "--device: 'cuda:99' cannot be used"),
        (["base", "--prompt", "x", "--chat"], "base: has no chat template"),
        (["base", "--prompt", "x", "--system", "y"], "base: has no chat template"),
        (["chat", "--batch", "nowhere.txt"], "nowhere.txt: no such file"),
        (["chat", "--batch", "chat"], "chat: a folder, expected a file of prompts"),
        (["chat", "--batch", "bytes.txt"], "bytes.txt: not text in UTF-8"),
        (["chat", "--batch", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["chat", "--batch", "list.jsonl"], 'list.jsonl, line 3: expected an object with "prompt"'),
        (["chat", "--batch", "role.jsonl"], 'role.jsonl, line 1: messages: expected objects with "role" and "content"'),
        (["chat", "--batch", "long.txt"], "long.txt, line 2: "),
        (
            ["base", "--batch", "talk.jsonl"],
            "talk.jsonl, line 1: has messages, and the checkpoint has no chat template",
        ),
        (["chat", "--batch", "talk.jsonl", "--out", "no/where.jsonl"], "where.jsonl: cannot be written ("),
    ],
)
def test_wrong_arguments_are_one_line(here, run, monkeypatch, arguments, message):
    """And all of them are found before the weights are read."""
    (here / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (here / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (here / "list.jsonl").write_text('{"prompt": "x"}\n\n{"text": "x"}\n')
    (here / "role.jsonl").write_text('{"messages": [{"content": "x"}]}\n')
    (here / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    (here / "long.txt").write_text("x\n" + "word " * 300)
    monkeypatch.setattr("dskernels.cli.generation._load", lambda *a: pytest.fail("the weights were read"))
    status, out, error = run("generate", *arguments, terminal=arguments == ["chat"])
    assert (status, out) == (1, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def spoil(name, text):
    def change(folder):
        (folder / name).write_text(text)

    return change


def cut_a_shard(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-500])


def drop_a_tensor(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"]["model.norm.weight"]
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (cut_a_shard, ["model-00002-of-", "truncated, tensor "]),
        (drop_a_tensor, ["model-0", "tensor model.norm.weight is missing"]),
        (spoil("model.safetensors.index.json", "{"), ["model.safetensors.index.json: not an index of tensors"]),
        (spoil("config.json", '{"architectures": ["Other"]}'), ["config.json: unknown architecture Other"]),
        (spoil("config.json", "{"), ["config.json: not JSON"]),
        (spoil("tokenizer.json", "{}"), ["tokenizer.json: not a tokenizer"]),
        (spoil("tokenizer_config.json", "["), ["tokenizer_config.json: not JSON"]),
        (spoil("tokenizer_config.json", '{"add_bos_token": true}'), ["add_bos_token is set and its bos_token None"]),
        (spoil("generation_config.json", '{"eos_token_id": "x"}'), ["generation_config.json: eos_token_id"]),
        (spoil("chat_template.jinja", "{% if %}"), ["chat_template.jinja: not a chat template"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json: no such file"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json: no such file"]),
    ],
)
def test_broken_folders_are_one_line(here, run, change, parts):
    change(here / "chat")
    status, out, error = run("generate", "chat", "--chat", "--prompt", "x")
    assert (status, out) == (1, "")
    assert error.startswith("error: chat/")
    assert all(part in error for part in parts), error
    assert error.count("\n") == 1


def test_a_folder_with_bytes_needs_no_tokenizer(run, tmp_path):
    save(DeepseekV3(Config.from_name("tiny")), tmp_path)
    status, out, error = run("generate", tmp_path, "--prompt", "def ", "--max-new-tokens", 4)
    assert status == 0, error
    assert out.startswith("def ")


# ---- chat templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{% for m in messages %}{% generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "  {% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n"
        "{% set ns.n = ns.n + 1 %}\n[{{ ns.n }}] {{ m.content }}{% endfor %}{{ eos_token }}",
    ],
)
def test_templates_render_as_in_transformers(here, template):
    transformers = pytest.importorskip("transformers")
    (here / "chat" / "chat_template.jinja").write_text(template)
    messages = [{"role": "system", "content": "a < b & 'c'"}, {"role": "user", "content": "ü\n"}]
    theirs = transformers.AutoTokenizer.from_pretrained(here / "chat")
    for add in (True, False):
        got = ChatTemplate.of(here / "chat").render(messages, add_generation_prompt=add)
        assert got == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ messages[7].content.x }}", "refuses the conversation"),
        ("{{ range(1000000) | list }}", "refuses the conversation"),
    ],
)
def test_templates_run_in_a_sandbox(tmp_path, template, message):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message) as error:
        ChatTemplate.of(tmp_path).render([{"role": "user", "content": "x"}])
    assert str(error.value).startswith(f"{tmp_path / 'chat_template.jinja'}: ")
    assert "\n" not in str(error.value)


def test_where_templates_are_found(tmp_path):
    """A file of its own before the settings; of several by name the default."""
    assert ChatTemplate.of(tmp_path) is None
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "settings"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert ChatTemplate.of(tmp_path).render([]) == "settings"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert ChatTemplate.of(tmp_path).render([]) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert ChatTemplate.of(tmp_path).render([]) == "jinja"
