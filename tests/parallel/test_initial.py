"""Initial weights that each rank makes for itself: the values of one process, without the whole model on any rank."""

import dataclasses
import resource
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import SMALL, corpus, recipe
from world import case, run

from dskernels.model import Config, DeepseekV3, save
from dskernels.model.checkpoint import load_weights
from dskernels.model.parallel import initial, training
from dskernels.model.parallel.initial import fill, held
from dskernels.model.parallel.plan import Plan, Team
from dskernels.model.train_begin import first_model
from dskernels.model.train_pieces import Piece

MODEL = Config.from_name("tiny", **SMALL)
FOUR = [Plan(data=4), Plan(data=2, expert=2), Plan(data=2, expert=2, reshard=False), Plan(pipeline=2, expert=2)]


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def begun(rank, plans, folder, init, gpus=False):
    """Compares what each rank of each plan holds with one process's; gives the rows that it holds."""
    initial.DRAWN = 64  # the tensors of this model are drawn in many parts
    found = []
    for plan in plans:
        for precision in ("fp32", "bf16"):
            with case(f"{plan} {precision}"):
                config = dataclasses.replace(recipe(seed=3, microbatches=8, batch_tokens=96), precision=precision)
                team = Team.start(plan, torch.device("cuda", rank) if gpus else "cpu")
                here = training._Run(MODEL, corpus(), config, team, Path(folder), "dualpipev", init, fresh=True)
                pieces = held([here.model] if here.pipeline is None else here.pipeline.stages, team)
                wanted = tensors(first_model(MODEL, config, torch.device("cpu"), torch.float32, init))
                for name, piece in pieces.items():
                    rows = wanted[name][piece.first : piece.first + len(piece.rows)]
                    assert torch.equal(piece.rows.cpu(), rows.detach().to(piece.rows.dtype)), name
                    assert piece.total == len(wanted[name]), name
                for name, master in here.optimizer.named(here.optimizer.flat).items():
                    first, _ = here.optimizer.place(name)
                    rows = wanted[name][first : first + len(master)].detach()
                    assert torch.equal(master.cpu(), rows.to(pieces[name].rows.dtype).float()), name
        found.append({name: (piece.first, len(piece.rows), piece.total) for name, piece in pieces.items()})
    return found


def check_begun(tmp_path, init):
    of_ranks = run(4, begun, FOUR, str(tmp_path / "run"), init)
    names = {name for name in tensors(DeepseekV3(MODEL, device="meta")) if not name.startswith("rope.")}
    for i, plan in enumerate(FOUR):
        with case(plan):
            assert {name for of_rank in of_ranks for name in of_rank[i]} == names
            for name in names:
                rows = {r for of_rank in of_ranks if name in of_rank[i] for r in range(*end_of(of_rank[i][name]))}
                assert rows == set(range(next(of_rank[i][name][2] for of_rank in of_ranks if name in of_rank[i])))
            if i < 2:
                assert of_ranks[0][i]["embed_tokens.weight"][1] < MODEL.vocab_size / 3


def end_of(piece):
    first, rows, _ = piece
    return first, first + rows


def test_ranks_draw_the_values_of_one_process(tmp_path):
    check_begun(tmp_path, None)


@pytest.mark.gpu
def test_gpus_draw_the_values_of_one_process_on_a_cpu(tmp_path):
    count = min(torch.cuda.device_count(), 2)
    plans = [Plan(data=count), Plan(expert=count), Plan(expert=count, reshard=False)]
    run(count, begun, plans, str(tmp_path / "run"), None, True, gpus=True)


def test_ranks_read_what_they_hold_of_other_weights(tmp_path):
    """A file in which gate and up are apart, as are the experts; the router's biases are not zero."""
    model = DeepseekV3(MODEL, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.normal_()
    save(model, tmp_path / "other", fp8=True)
    check_begun(tmp_path, str(tmp_path / "other"))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64, 65, 80, 127, 128, 129, 143, 144, 145, 1000])
def test_a_tensor_in_parts_has_the_values_of_the_whole(size, monkeypatch):
    """And so has the next, whose values depend on how many numbers were drawn before."""
    monkeypatch.setattr(initial, "DRAWN", 64)
    one, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    numbers, rows = torch.empty(64 + 16), torch.empty(size - size // 3 - size // 4)
    initial._draw(torch.Size([size]), Piece(rows, size // 3, size), 0.02, other, numbers)
    wanted = torch.empty(size).normal_(0.0, 0.02, generator=one)
    assert torch.equal(rows, wanted[size // 3 :][: len(rows)])
    assert torch.equal(one.get_state(), other.get_state())


def test_a_copy_of_the_embedding_is_compared_by_who_has_the_rows(tmp_path):
    model, whole = DeepseekV3(MODEL), DeepseekV3(MODEL, device="meta")
    save(model, tmp_path)
    stored, copy = load_file(tmp_path / "model.safetensors"), "model.layers.4.embed_tokens.weight"
    stored[copy] = stored[copy].clone()
    stored[copy][103] += 1.0
    save_file(stored, tmp_path / "model.safetensors")
    embedding = model.embed_tokens.weight.detach()
    for first, same in ((96, True), (100, False), (104, True)):
        rows = torch.empty(4, MODEL.hidden_size)
        pieces = {"embed_tokens.weight": Piece(rows, first, MODEL.vocab_size)}
        with nullcontext() if same else pytest.raises(ValueError, match=f"{copy} is not the copy"):
            load_weights(whole, tmp_path, into=pieces)
        assert torch.equal(rows, embedding[first : first + 4])
    load_weights(whole, tmp_path, into={})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape"):  # by ranks that hold none of it, too
        load_weights(DeepseekV3(MODEL.replace(hidden_size=48), device="meta"), tmp_path, into={})


def resumed(rank, folder):
    team, options = Team.start(Plan(data=2), "cpu"), dict(out=folder, checkpoint_every=1)
    training.train(MODEL, corpus(), recipe(), team, **options)

    def refused(*_, **__):
        raise AssertionError("drawn, though a checkpoint has all of it")

    training.fill = refused
    assert training.train(MODEL, corpus(), recipe(), team, **options) == []


def test_a_run_that_goes_on_draws_nothing(tmp_path):
    run(2, resumed, str(tmp_path))


def growth(rank, rows):
    """MiB by which the most memory that a process has had grows while it draws some rows of a model of 153 MiB."""
    config = MODEL.replace(vocab_size=1 << 16, hidden_size=256, num_attention_heads=1, n_routed_experts=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pieces = {"embed_tokens.weight": Piece(torch.empty(rows, 256), 0, 1 << 16)}
    fill(pieces, config, seed=0, init=None)
    assert 0.015 < float(pieces["embed_tokens.weight"].rows.std()) < 0.025
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_a_rank_does_not_have_what_it_does_not_hold():
    """16 MiB of numbers at a time, and the 8 MiB of rows that stay; the rest is what Python takes meanwhile."""
    (grown,) = run(1, growth, 8192)
    assert grown < 64
