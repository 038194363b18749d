"""``dskernels generate``: text from a checkpoint, a conversation, or the answers to a file of prompts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from dskernels.cli import together

if TYPE_CHECKING:
    from dskernels.model import ChatTemplate, DeepseekV3, LatentCache, TextStream
    from dskernels.model.tokens import Tokenizer

EXAMPLES = """[bold]Examples[/bold]

dskernels generate run --prompt "def " --max-new-tokens 60 --draft 1

echo "What is an expert?" | dskernels generate DeepSeek-V2-Lite-Chat --chat

dskernels generate DeepSeek-V2-Lite-Chat --chat --temperature 0.7 --top-p 0.95 --seed 1

dskernels generate run --batch prompts.jsonl --out texts.jsonl --stop "\\n\\n"

torchrun --nproc-per-node 2 -m dskernels generate run --prompt "def "
"""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAGE = 64
CONVERSATION = 8192  # tokens that a conversation has room for at first: 0.58 GB with DeepSeek-V3
# Only the text goes to stdout.
console = Console(stderr=True)


def generate(
    path: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.", show_default=False)],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="Text to continue, or with --chat your message; read from stdin if not given."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Converse, by the folder's chat template; turn by turn in a terminal.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt of the conversation.")] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='File of prompts: one a line, or JSON with "prompt" or "messages" in each line; - is stdin. '
            "JSON lines come out, in the order of the file."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File that --batch writes to instead of stdout.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate for each text.")] = 200,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated. \\n is a line break, \\t a tab.")
    ] = None,
    draft: Annotated[int, typer.Option(help="Tokens that the MTP module drafts in each step; 0 for none.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 sets no limit.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens with this total probability.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Exclude tokens less likely than this fraction of the most likely one.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    fp8: Annotated[
        bool | None, typer.Option("--fp8/--no-fp8", help="Compute in fp8; by default if the checkpoint is in fp8.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Texts generated at the same time.")] = 64,
    graphs: Annotated[
        bool | None,
        typer.Option("--graphs/--no-graphs", help="Replay each step as a CUDA graph; by default on a GPU."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Compute in bf16, fp16 or fp32; by default in the checkpoint's type.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1 or cpu; by default the GPU if there is one.")
    ] = None,
) -> None:
    """Continue a text, answer in a conversation, or work through a file of prompts, and show the speed.

    Under torchrun, each rank reads and holds its part of the model, in fp8 too, and all write one text together.
    """
    # Everything that can be wrong is checked before the weights are read, which may take minutes.
    from dskernels.cli.prompts import Prompt, read_prompts
    from dskernels.model import ChatTemplate, Sampling, tokenizer_of
    from dskernels.model.tokens import end_tokens

    if prompt is not None and batch is not None:
        raise ValueError("--prompt: expected without --batch")
    alone = together.ranks() == 1
    if not alone and (str(batch) == "-" or (prompt is None and batch is None)):
        raise ValueError("--prompt: expected it, or --batch with a file, as ranks cannot share stdin")
    if out is not None and batch is None:
        raise ValueError("--out: expected with --batch")
    limits = (("--max-new-tokens", max_new_tokens, 1), ("--max-batch", max_batch, 1), ("--draft", draft, 0))
    for name, number, least in limits:
        if number < least:
            raise ValueError(f"{name}: expected at least {least}, got {number}")
    if "" in (stop or ()):
        raise ValueError("--stop: expected a text, got an empty one")
    Sampling(temperature, top_k, top_p, min_p)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    config, settings = _description(path, fp8, draft)
    settings["dtype"] = None if dtype is None else DTYPES[dtype]
    where = _device(device)
    if graphs and where.type != "cuda":
        raise ValueError(f"--graphs: needs a GPU, the model would run on {where.type}")
    tokenizer = tokenizer_of(path, config)
    template = ChatTemplate.of(path)
    if (chat or system is not None) and template is None:
        raise ValueError(f"{path}: has no chat template (chat_template.jinja, or one in tokenizer_config.json)")
    writer = _Writer(
        tokenizer,
        template if chat or system is not None else None,
        [] if system is None else [{"role": "system", "content": system}],
        {
            "max_new_tokens": max_new_tokens,
            "stop": [_unescaped(text) for text in stop or ()],
            "drafts": draft,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "eos": end_tokens(path, config),
            "max_batch": max_batch,
            "graphs": graphs,
        },
        seed,
    )
    interactive = alone and writer.template is not None and batch is None and sys.stdin.isatty() and sys.stdout.isatty()
    if batch is not None:
        prompts = read_prompts(batch, writer.template, template, tokenizer, writer.messages)
        for one in prompts:
            one.check(max_new_tokens, config.max_position_embeddings)
        with _opened(out) as file:
            if prompts:
                writer.model = _load(path, where, device, settings)
                writer.work_through(prompts, file)
        return
    if prompt is None and not interactive:
        if sys.stdin.isatty():
            raise ValueError(
                "--prompt: expected a text to continue (or --chat to talk, or --batch for a file of prompts)"
            )
        prompt = sys.stdin.read().removesuffix("\n")
    tokens = [] if prompt is None else writer.tokens(prompt)
    if prompt is not None:
        Prompt("--prompt", {}, tokens).check(max_new_tokens, config.max_position_embeddings)
    writer.model = _load(path, where, device, settings)
    if interactive:
        writer.talk(prompt)
    else:
        writer.write(tokens, "" if prompt is None or writer.template is not None else prompt)


@dataclass
class _Writer:
    """Writes texts with one model and one set of options."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    messages: list[dict[str, Any]]
    options: dict[str, Any]
    seed: int
    model: DeepseekV3 | None = None
    cache: LatentCache | None = None  # of a conversation: each turn begins with the earlier ones

    def tokens(self, text: str) -> list[int]:
        """The tokens of a prompt or, with a template, of the next turn of the conversation."""
        if self.template is None:
            return self.tokenizer.encode(text)
        prompt = self.template.render([*self.messages, {"role": "user", "content": text}])
        return self.tokenizer.encode(prompt, special=False)  # the template contains the special tokens

    def write(self, tokens: list[int], before: str = "") -> str:
        """Print a continuation (after ``before``) or an answer as it comes, then the speed; returns the new text."""
        start, first, count, answer = time.perf_counter(), 0.0, 0, ""
        warm, before_that = start, 0  # time of, and tokens before, the third step: earlier ones capture graphs
        stream = self._stream([tokens], cache=self.cache)
        print(before, end="", flush=True)
        try:
            for i, step in enumerate(stream):
                first = first or time.perf_counter() - start
                count += step.count
                if i == 2:
                    warm, before_that = time.perf_counter(), count
                print(step.deltas[0], end="", flush=True)
                answer += step.deltas[0]
        finally:  # also after Ctrl-C: end the line, give the pages back
            stream.close()
            print(flush=True)
        speed = (count - before_that) / (time.perf_counter() - warm)
        rate = f" {speed:,.1f} tokens/s," if before_that < count else ""  # too few tokens to tell
        self._report(f"{count} tokens,{rate} the first after {first:.2f} s", stream)
        return answer

    def talk(self, said: str | None) -> None:
        """Converse until Ctrl-D; Ctrl-C ends an answer."""
        with suppress(ImportError):
            import readline  # noqa: F401 - with it, input() edits and remembers lines
        console.print("[dim]Ctrl-D ends the conversation, Ctrl-C an answer.[/dim]", highlight=False)
        if said is not None:
            print(f"> {said}")
        while True:
            try:
                said = input("> ") if said is None else said
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if said.strip():
                try:
                    tokens = self.tokens(said)
                    self._make_room(len(tokens))
                    answer = self.write(tokens)
                    turn = {"role": "user", "content": said}, {"role": "assistant", "content": answer}
                    self.messages.extend(turn)
                except KeyboardInterrupt:
                    pass
                except ValueError as error:  # the context is full, or the template wants something else
                    console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            said = None

    def work_through(self, prompts: list[Any], file: TextIO) -> None:
        """Write a line for each prompt, in order, as soon as it and those before it are done."""
        start, count, next_line = time.perf_counter(), 0, 0
        stream = self._stream([prompt.tokens for prompt in prompts])
        columns = (TextColumn("prompts"), BarColumn(), TextColumn("{task.completed:,}/{task.total:,}"))
        speed = TextColumn("{task.fields[said]}")
        with Progress(
            *columns, speed, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task("prompts", total=len(prompts), said="")
            for step in stream:
                count += step.count
                while next_line < len(prompts) and stream.generation.ended(next_line):
                    print(self._line(prompts[next_line], stream, next_line), file=file, flush=True)
                    next_line += 1
                said = f"{count / (time.perf_counter() - start):,.0f} tokens/s"
                bar.update(task, completed=next_line, said=said)
        seconds = time.perf_counter() - start
        self._report(f"{len(prompts)} prompts, {count:,} tokens, {count / seconds:,.1f} tokens/s", stream)

    def _line(self, prompt: Any, stream: TextStream, index: int) -> str:
        tokens = stream.generation.tokens[index]
        stopped = len(tokens) < self.options["max_new_tokens"] or tokens[-1] in self.options["eos"]
        return prompt.answered(stream.texts[index], len(tokens), "stop" if stopped else "length")

    def _make_room(self, tokens: int) -> None:
        """Make sure that the cache shared by all turns has room; only if it is too small are earlier turns computed
        again."""
        from dskernels.model import LatentCache

        model = self._loaded()
        longest = tokens + self.options["max_new_tokens"] + self.options["drafts"]
        if self.cache is None or self.cache.pages_for(longest) > self.cache.pages:
            weight = model.embed_tokens.weight
            pages = max(2 * -(-longest // PAGE), CONVERSATION // PAGE)
            self.cache = LatentCache(
                model.config, pages=pages, page_size=PAGE, dtype=weight.dtype, device=weight.device
            )

    def _loaded(self) -> DeepseekV3:
        if self.model is None:
            raise RuntimeError("the model is not loaded yet")
        return self.model

    def _stream(self, prompts: list[list[int]], **options: Any) -> TextStream:
        from dskernels.model import stream_text

        # Each prompt has its own seed, so a text does not depend on those beside it.
        seeds = [self.seed + i for i in range(len(prompts))]
        return stream_text(self._loaded(), self.tokenizer, prompts, seed=seeds, **self.options, **options)

    def _report(self, said: str, stream: TextStream) -> None:
        generation = stream.generation
        if self.options["drafts"]:
            said += f"; {generation.acceptance_rate:.0%} of {generation.drafted:,} drafted tokens accepted"
        console.print(f"[dim]{said}[/dim]", highlight=False, soft_wrap=True)


def _description(path: Path, fp8: bool | None, draft: int) -> tuple[Any, dict[str, Any]]:
    """The config, and the arguments to load the model with."""
    from dskernels.model import Config
    from dskernels.model.config import read_json

    if path.is_file():
        raise NotADirectoryError(f"{path}: a file, expected the folder of a checkpoint")
    if not path.is_dir():
        hub = not path.is_absolute() and len(path.parts) == 2 and not path.parent.exists()
        how = f"download it with `hf download {path} --local-dir {path.name}`" if hub else "expected a checkpoint's"
        raise FileNotFoundError(f"{path}: no such folder ({how})")
    config = Config.from_hf(path)
    if draft and not config.num_nextn_predict_layers:
        raise ValueError(f"--draft: {path} has no MTP module to draft with")
    if fp8 is None:
        fp8 = bool(read_json(path / "config.json").get("quantization_config"))
    # The MTP module is only needed for drafts; DeepSeek-V3's has 11.6 GB.
    return config, {"fp8": fp8, "mtp": bool(draft)}


def _device(name: str | None) -> torch.device:
    from dskernels.device import default_device

    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def _load(path: Path, where: torch.device, device: str | None, settings: dict[str, Any]) -> DeepseekV3:
    """Read the model, with a progress bar; under torchrun this rank's part of it."""
    from dskernels.model import load

    team = None if together.ranks() == 1 else together.start_generating(device, console)
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # A bar that is not drawn would still print its line break.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        settings["progress"] = lambda done, total: bar.update(task, completed=done, total=total)
        if team is None:
            return load(path, device=where, **settings)
        from dskernels.model.parallel.reading import load_divided

        return load_divided(path, team, **settings)


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    """The file that is written to, or stdout; of several ranks only the first writes."""
    if out is None:
        yield sys.stdout
        return
    if not together.speaks():
        out = Path(os.devnull)
    from dskernels.model.disk import writing

    with writing(out), out.open("w", encoding="utf-8") as file:
        yield file


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")
