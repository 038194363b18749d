"""Pieces of tensors: pieces of any size are filled from any others, and what is wrong with a checkpoint is said."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dskernels.model.train_pieces import PIECES, Piece, Pieces, StoredTensor


def write(folder, cuts, tensor, name="a", files=()):
    """A checkpoint whose ranks have the rows between the cuts."""
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"step": 1, "files": list(files)}))
    for rank, (begin, end) in enumerate(itertools.pairwise(cuts)):
        file = folder / PIECES.format(rank, 1)
        save_file({name: tensor[begin:end].clone()}, file.with_suffix(".safetensors"))
        file.with_suffix(".json").write_text(json.dumps({name: [begin, len(tensor)]}))


@given(st.data())
def test_any_pieces_are_filled_from_any_others(tmp_path_factory, data):
    rows = data.draw(st.integers(1, 9))
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    begin = data.draw(st.integers(0, rows))
    end = data.draw(st.integers(begin, rows))
    tensor, folder = torch.randn(rows, 2), tmp_path_factory.mktemp("pieces")
    write(folder, cuts, tensor)
    into = torch.full((end - begin, 2), torch.nan)
    Pieces(folder).read({"a": Piece(into, begin, rows)})
    assert torch.equal(into, tensor[begin:end])


def test_rows_are_filled_from_whole_tensors_and_rounded(tmp_path):
    """As one process writes them."""
    tensor = torch.randn(5, 3)
    write(tmp_path, [0], tensor, files=["state-00001.safetensors"])
    save_file({"a": tensor}, tmp_path / "state-00001.safetensors")
    into = torch.empty(2, 3, dtype=torch.bfloat16)
    Pieces(tmp_path).read({"a": Piece(into, 2, 5)})
    assert torch.equal(into, tensor[2:4].bfloat16())


def test_what_is_missing_or_damaged_is_named(tmp_path):
    tensor, first = torch.randn(4, 3), tmp_path / "pieces-00000-00001.safetensors"
    write(tmp_path, [0, 2, 4], tensor)
    with pytest.raises(
        ValueError, match=r"pieces-00000-00001\.safetensors: tensor a has rows of shape \[3\], expected \[2\]"
    ):
        Pieces(tmp_path).read({"a": Piece.all_of(torch.empty(4, 2))})
    with pytest.raises(ValueError, match="2 rows of tensor b are missing"):
        Pieces(tmp_path).read({"b": Piece(torch.empty(2, 3), 0, 4)})
    first.write_bytes(first.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"pieces-00000-00001\.safetensors: cannot be read"):
        Pieces(tmp_path).read({"a": Piece.all_of(torch.empty(4, 3))})
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"pieces-00000-00001\.safetensors: no such file"):
        Pieces(tmp_path).read({"a": Piece.all_of(torch.empty(4, 3))})
    first.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="2 rows of tensor a are missing"):
        Pieces(tmp_path).read({"a": Piece.all_of(torch.empty(4, 3))})
    first.with_suffix(".json").write_text("[]")
    with pytest.raises(ValueError, match=r"pieces-00000-00001\.json: not a list of pieces"):
        Pieces(tmp_path).read({"a": Piece.all_of(torch.empty(4, 3))})


def test_parts_of_a_stored_tensor_are_those_of_the_tensor(tmp_path):
    """As the table of a checkpoint's tensors names them: all, rows, a matrix of a stack, rows or columns of one."""
    tensor = torch.randn(5, 4, 3)
    write(tmp_path, [0, 2, 5], tensor)
    stored = StoredTensor(Pieces(tmp_path), "a", torch.empty(5, 4, 3, dtype=torch.bfloat16, device="meta")).detach()
    everything = slice(None)
    for part in ((), (slice(1, 4),), (3,), (2, slice(1, 3)), (0, everything, slice(0, 2))):
        assert torch.equal(stored[part], tensor.bfloat16()[part]), part
