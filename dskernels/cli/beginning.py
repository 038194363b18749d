"""What a training run of ``dskernels train`` begins with: the model, the text as tokens, and whether it resumes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from dskernels.model import Config
    from dskernels.model.data import Corpus
    from dskernels.model.train_config import TrainConfig

TOKENS = "tokens"
console = Console()


class Begun(NamedTuple):
    """What a run starts from, or resumes from."""

    model: Config
    corpus: Corpus
    tokens: Path
    checkpoint: Path | None


def begin(
    config: str,
    data: list[Path] | None,
    out: Path,
    tokenizer: str,
    held_out: float,
    init: Path | None,
    recipe: TrainConfig,
    resume: bool | None,
    *,
    writes: bool = True,
) -> Begun:
    """Find or make everything that a run needs, print what it is, and record it if the run is new."""
    from dskernels.model.train_state import checkpoints

    shape = shape_of(config)
    found = next(iter(checkpoints(out)), None) if resume is not False else None
    if resume and found is None:
        raise ValueError(f"--resume: {out} has no checkpoint to go on from")
    corpus, tokens, about = _text(data, out, tokenizer, held_out, recipe.seed, again=found is not None)
    model = _with_vocabulary(shape, config, about)
    if init is not None:
        _same_tokenizer(init, tokens)
    if found is not None:
        if writes:
            _same_data(data, out)
        console.print(f"Going on from {found}.", highlight=False, soft_wrap=True)
    elif writes:
        first: dict[str, Any] = {} if init is None else {"init": str(init)}
        first |= {"data": [str(path) for path in data or ()]}
        _write_json(out / "train.json", {"config": config, **first, **asdict(recipe)})
    return Begun(model, corpus, tokens, found)


def of_init(init: Path | None, config: str | None, tokenizer: str | None, again: Path | None) -> tuple[str, str]:
    """The model and the tokenizer to use, which by default are those of the ``--init`` folder.

    A run that is resumed in ``again`` with a named model does not need that folder any more.
    """
    from dskernels.model.train_state import checkpoints

    if init is None:
        return config or "demo", tokenizer or "bytes"
    if not init.is_dir() and (config is None or again is None or not checkpoints(again)):
        raise FileNotFoundError(f"--init: {init}: no such folder")
    theirs = init / "tokenizer.json"
    return config or str(init), tokenizer or (str(theirs) if theirs.is_file() else "bytes")


def _same_tokenizer(init: Path, tokens: Path) -> None:
    """Raise a ValueError if the weights were trained with another tokenizer, even one of the same size."""
    from dskernels.model.config import read_json

    theirs, ours = init / "tokenizer.json", tokens / "tokenizer.json"
    if theirs.is_file() and (not ours.is_file() or read_json(theirs).get("model") != read_json(ours).get("model")):
        raise ValueError(f"--init: {theirs} is not the tokenizer of {tokens}")


def _same_data(data: list[Path] | None, out: Path) -> None:
    """Raise a ValueError if a run that is resumed, and so reads the tokens it has, is given other text."""
    from dskernels.model.config import read_json

    file = out / "train.json"
    begun_with = read_json(file).get("data") if file.is_file() else None
    given = [str(path) for path in data or ()]
    if given and begun_with is not None and given != begun_with:
        said = " ".join(begun_with) or "Python's standard library"
        raise ValueError(
            f"--data: {out} was begun with {said}, asked for is {' '.join(given)} (leave out --data to go on with that "
            f"text; for another, begin anew with --restart or in another folder)"
        )


def shape_of(config: str) -> Config:
    """The shape of the model that was asked for: a folder, a file, or a preset."""
    from dskernels.model import Config

    return Config.from_hf(config) if Path(config).exists() else Config.from_name(config)


def _text(
    data: list[Path] | None, out: Path, tokenizer: str, held_out: float, seed: int, again: bool
) -> tuple[Corpus, Path, dict[str, Any]]:
    """The text as tokens, the folder that contains them, and what its ``tokens.json`` says about them."""
    from dskernels.model.config import read_json
    from dskernels.model.data import document_lengths, find_files, standard_library
    from dskernels.model.encoders import encoder_of
    from dskernels.model.token_file import ABOUT_FILE, is_token_folder, read_tokens, write_tokens

    given = data or []
    if len(given) == 1 and is_token_folder(given[0]):
        folder = given[0]
        corpus = read_tokens(folder)
    elif again and is_token_folder(out / TOKENS):  # what the run began with, even if the files are gone
        folder = out / TOKENS
        corpus = read_tokens(folder)
    else:
        folder = out / TOKENS
        files = find_files(given) if given else standard_library()
        for path in given:
            if path.is_file() and not path.stat().st_size:
                raise ValueError(f"{path}: empty")
        columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("tokenising", total=None)
            corpus = write_tokens(
                files,
                folder,
                encoder_of(tokenizer, files),
                held_out=held_out,
                seed=seed,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    about = read_json(folder / ABOUT_FILE)
    counts = [int(document_lengths(documents).sum()) for documents in corpus]
    console.print(
        f"{counts[0]:,} tokens in {len(corpus.train):,} documents to learn from, {counts[1]:,} in "
        f"{len(corpus.validation):,} held out; {about['bytes']:,} bytes of text, tokenizer: {about['tokenizer']}.",
        highlight=False,
        soft_wrap=True,
    )
    return corpus, folder, about


def _with_vocabulary(shape: Config, name: str, about: dict[str, Any]) -> Config:
    """The model for these tokens: with their vocabulary, and their boundary token at both ends of a text.

    A given tokenizer may have fewer tokens than a given model, as DeepSeek-V3's has.
    """
    size, boundary = int(about["vocab_size"]), int(about["boundary"])
    given = Path(str(about["tokenizer"])).name == "tokenizer.json"
    if given and size <= shape.vocab_size:
        size = shape.vocab_size
    if size != shape.vocab_size:
        console.print(f"A vocabulary of {size:,} tokens; that of {name} has {shape.vocab_size:,}.", highlight=False)
    return shape.replace(vocab_size=size, bos_token_id=boundary, eos_token_id=(boundary,))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    from dskernels.model.disk import writing

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
