"""What runs over gloo in the other tests, on two GPUs over NCCL and copy engines."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from test_decode import PROMPTS
from test_plans import check_plan
from test_training import NUMBERS, RECIPE, SMALL, corpus, recipe
from world import case, run

from dskernels.model import Config, generate, load
from dskernels.model.parallel.copies import MOST_PIECES, SLOTS, CopyEngines
from dskernels.model.parallel.decode import parallelize_decode
from dskernels.model.parallel.engines import reach_each_other
from dskernels.model.parallel.exchange import pack
from dskernels.model.parallel.expert import ExpertParallel
from dskernels.model.parallel.fixed import largest_message
from dskernels.model.parallel.mail import Collective, message_bytes
from dskernels.model.parallel.overlap import overlapped
from dskernels.model.parallel.plan import Plan, Team
from dskernels.model.parallel.training import train as train_together
from dskernels.types import Routing
from model.tiny import tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


# ---- messages -------------------------------------------------------------------------------------------------------


def letters(rank):
    """More messages than slots, of several sizes, in pieces, each read late and then again in time."""
    device, group = torch.device("cuda", rank), dist.group.WORLD
    assert reach_each_other(group)
    rows, width = 1000, 513
    mail = CopyEngines(group, message_bytes([(rows, 4 * width), (rows, 16)]), piece=rows * width)  # four pieces
    assert SLOTS == 4
    plain = Collective(group)
    generator = torch.Generator(device).manual_seed(rank)

    def message(n):
        first = torch.randint(0, 2**30, (n, width), device=device, generator=generator, dtype=torch.int32)
        return [first, pack(torch.rand(n, 3, device=device, generator=generator))]

    def read(mail, sent):
        pieces = list(mail.arriving(sent))
        found = [part.clone() for part in mail.from_rank(sent, 1 - rank)]
        mail.finished(sent)
        return found, pieces

    for round_ in range(12):
        sizes = [(rows, 7, 1)[(round_ + i) % 3] for i in range(3)]  # three are under way at once
        messages = [[message(n), message(n)] for n in sizes]
        torch.cuda._sleep(int(2e6) * ((rank + round_) % 2))  # now the one is late, now the other
        sent = [mail.send(both) for both in messages]
        wanted = [read(plain, plain.send(both))[0] for both in messages]
        for one, want in zip(sent, wanted, strict=True):
            found, pieces = read(mail, one)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
            assert sum(piece.stop - piece.start for piece in pieces) == want[0].shape[0]
            assert len(pieces) <= MOST_PIECES
    with pytest.raises(ValueError, match="outgoing: expected at most"):
        mail.send([message(2 * rows)] * 2)
    graph = torch.cuda.CUDAGraph()
    big = [message(rows)] * 2
    with pytest.raises(RuntimeError, match="cannot be in a CUDA graph"), torch.cuda.graph(graph):
        mail.send(big)


def layers(rank):
    """An expert-parallel layer by copy engines has the bits of the one that counts, forward and backward."""
    device, group = torch.device("cuda", rank), dist.group.WORLD
    experts, hidden, inner, k, capacity = 16, 1024, 256, 4, 4096
    mail = CopyEngines(group, largest_message(capacity, hidden, k, torch.bfloat16))
    torch.manual_seed(3)
    w13, w2 = (
        (torch.randn(experts, *shape, device=device) / 32).bfloat16()
        for shape in ((2 * inner, hidden), (hidden, inner))
    )
    own = slice(rank * experts // 2, (rank + 1) * experts // 2)
    torch.manual_seed(10 + rank)
    for wire, fp8, n in (
        ("same", False, 4096),
        ("fp8", True, 3000 + rank),
        ("same", True, 5 * rank),
        ("fp8", False, 4096),
    ):
        x = torch.randn(n, hidden, device=device).bfloat16()
        ids = torch.rand(n, experts, device=device).topk(k).indices.int()
        ids[::7, 1] = -1
        none = ids.new_empty(0)
        gates, dout = torch.rand(n, k, device=device), torch.randn(n, hidden, device=device).bfloat16()
        found = []
        for options in (dict(), dict(mail=mail, tokens=capacity), dict(mail=mail, tokens=capacity)):
            compute = ExpertParallel(group, experts, wire=wire, **options)
            leaves = [t.clone().requires_grad_() for t in (x, gates, w13[own], w2[own])]
            out = compute(leaves[0], *leaves[2:], Routing(leaves[1], ids, none, none), fp8=fp8)
            out.backward(dout)
            found.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for again in found[1:]:
            for a, b, name in zip(found[0], again, ("out", "dx", "dgates", "dw13", "dw2"), strict=True):
                assert torch.equal(a, b), f"{name} of wire {wire}, fp8 {fp8}: {(a - b).abs().max()}"

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            from dskernels.model.moe import MoE

            with torch.device("meta"):
                self.moe = MoE(Config.from_name("tiny"), False)
            self.moe.experts.compute = ExpertParallel(group, experts, mail=mail, tokens=capacity)

        def forward(self, x, ids, gates):
            none = ids.new_empty(0)
            for _ in range(3):
                x = self.moe.experts.compute(x, w13[own], w2[own], Routing(gates, ids, none, none))
            return x

    model = Two()
    halves = [(x[i::2].contiguous(), ids[i::2].contiguous(), gates[i::2].contiguous()) for i in range(2)]
    with torch.no_grad():
        wanted = [model(*half) for half in halves]
        for _ in range(3):
            together = overlapped(model, [lambda half=half: model(*half) for half in halves])
            assert all(torch.equal(a, b) for a, b in zip(together, wanted, strict=True))


def exchanges(rank):
    letters(rank)
    layers(rank)


def test_copy_engines():
    run(2, exchanges, gpus=True)


# ---- plans, training, generation ------------------------------------------------------------------------------------


def every_plan(rank):
    device = torch.device("cuda", rank)
    cases = [(Plan(data=2),), (Plan(expert=2),), (Plan(expert=2, exchange="counted", reshard=False),)]
    cases += [(Plan(pipeline=2), "dualpipev"), (Plan(pipeline=2), "zbv")]
    for plan, *schedule in cases:
        with case(f"{plan} {schedule}"):
            check_plan(plan, *schedule, device=device)


def test_losses_and_gradients_are_those_of_one_process():
    run(2, every_plan, gpus=True)


def trainings(rank, folder):
    found = []
    for i, plan in enumerate((Plan(data=2), Plan(expert=2), Plan(pipeline=2))):
        team = Team.start(plan, torch.device("cuda", rank))
        options = dict(out=f"{folder}/{i}", checkpoint_every=1, keep=3)
        found.append(train_together(Config.from_name("tiny", **SMALL), corpus(), recipe(), team, **options))
    return found


def one_gpu(rank, folder, resume):
    team = Team.start(Plan(), torch.device("cuda", rank))
    return train_together(Config.from_name("tiny", **SMALL), corpus(), recipe(), team, out=folder, resume=resume)


def same_curve(history, wanted):
    assert [line["step"] for line in history] == [line["step"] for line in wanted]
    for line, expected in zip(history, wanted, strict=True):
        for name in NUMBERS:
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-6), (line["step"], name)


def test_training_has_the_curve_of_one_gpu_and_goes_on_with_one(tmp_path):
    histories = run(2, trainings, str(tmp_path), gpus=True)[0]
    alone = run(1, one_gpu, str(tmp_path / "alone"), None, gpus=True)[0]  # `train` draws its weights on the GPU
    for history in histories:
        same_curve(history, alone)
    assert json.loads((tmp_path / "0" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == RECIPE["steps"]
    (tmp_path / "1" / "checkpoints" / "step-00000002" / "state.json").unlink()
    rest = run(1, one_gpu, str(tmp_path / "1"), True, gpus=True)[0]
    same_curve(rest, [line for line in alone if line["step"] > 1])
    tokens = torch.arange(12, device="cuda:0")
    logits = [load(tmp_path / name, device="cuda:0")(tokens).logits for name in ("0", "1", "2", "alone")]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-2, atol=1e-3)


def generations(rank):
    torch.manual_seed(0)
    device = torch.device("cuda", rank)
    whole = tiny_model(num_hidden_layers=2, n_routed_experts=8, num_experts_per_tok=3, vocab_size=64)
    team = Team.start(Plan(tensor=2), device)
    model = parallelize_decode(copy.deepcopy(whole), team)
    whole.to(device)
    tokens = torch.tensor(PROMPTS[0], device=device)
    torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, rtol=1e-3, atol=1e-3)
    for options in (dict(), dict(drafts=1), dict(temperature=0.8, seed=7)):
        texts = [generate(m, PROMPTS, max_new_tokens=12, **options).tokens for m in (model, whole)]
        assert texts[0] == texts[1], options


def test_generation_has_the_tokens_of_one_gpu():
    run(2, generations, gpus=True)
