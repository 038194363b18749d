"""Operations inside of what torch has around a call: checkpoints, hooks, subclasses, fakes, export, FSDP2, pools."""

import copy
import functools
import io

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dskernels as ds


class Network(torch.nn.Module):
    """Two layers in e4m3."""

    def __init__(self, device="cpu"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(2, 256, 256, generator=generator).to(device, torch.bfloat16) / 16
        self.up, self.down = (torch.nn.Parameter(weight.clone()) for weight in weights)

    def forward(self, x):
        return ds.fp8_linear(torch.relu(ds.fp8_linear(x, self.up)), self.down)


@pytest.fixture
def x(device):
    return torch.randn(5, 256, device=device).bfloat16()


def gradients(network, x, run=None):
    """Of the weights and the input, on a GPU from the third of three passes."""
    for _ in range(3 if x.is_cuda else 1):
        x = x.detach().requires_grad_()
        network.zero_grad()
        (run or network)(x).float().square().sum().backward()
    return [x.grad, *(weight.grad for weight in network.parameters())]


def keeps_products(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if "fp8_linear" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective", "on the CPU", "anomalies looked for"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_what_is_kept_for_a_backward(device, x, how):
    network = Network(device)
    selective = functools.partial(create_selective_checkpoint_contexts, keeps_products)
    options = {
        "reentrant": {"use_reentrant": True},
        "not reentrant": {"use_reentrant": False},
        "selective": {"use_reentrant": False, "context_fn": selective},
    }.get(how)

    def run(x):
        if options is not None:
            return checkpoint(network, x, **options)
        with torch.autograd.graph.save_on_cpu() if how == "on the CPU" else torch.autograd.detect_anomaly():
            return network(x)

    for got, want in zip(gradients(network, x, run), gradients(network, x), strict=True):
        assert torch.equal(got, want)


def test_hooks_of_tensors(device, x):
    network, seen = Network(device), []
    want = gradients(network, x)[1]
    network.up.register_hook(lambda gradient: 2 * gradient)
    network.up.register_post_accumulate_grad_hook(lambda weight: seen.append(weight))
    assert torch.equal(gradients(network, x)[1], 2 * want)
    assert all(weight is network.up for weight in seen)
    assert seen


def test_subclasses_and_fakes(device, x):
    weight = Network(device).up
    want = ds.fp8_linear(x, weight)
    for _ in range(3):
        both = ds.fp8_linear(TwoTensor(x, 2 * x), weight)
        assert torch.equal(both.a, want)
        assert torch.equal(both.b, ds.fp8_linear(2 * x, weight))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = ds.fp8_linear(mode.from_tensor(x), mode.from_tensor(weight.detach()))
        assert (fake.shape, fake.device, fake.dtype) == (want.shape, want.device, want.dtype)
        assert ds.fp8_linear(x.to("meta"), weight.to("meta")).is_meta
    assert torch.equal(ds.fp8_linear(x, weight), want)


def test_export_for_any_number_of_tokens(device, x):
    network = Network(device).requires_grad_(False)
    exported = torch.export.export(network, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=2)}})
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for module in (exported.module(), torch.export.load(file).module()):
        for tokens in (2, 5, 70):
            some = torch.randn(tokens, 256, device=device).bfloat16()
            assert torch.equal(module(some), network(some))


def test_fsdp2(device, x):
    """It gathers into the same tensors, and puts their version counters back."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = Network(device)
        mesh = torch.distributed.init_device_mesh(torch.device(device).type, (1,))
        sharded = fully_shard(copy.deepcopy(plain), mesh=mesh)
        for _ in range(4):
            results = []
            for network in (plain, sharded):
                network.zero_grad()
                results.append(network(x))
                results[-1].float().square().mean().backward()
                with torch.no_grad():
                    for weight in network.parameters():
                        weight -= weight.grad
            assert torch.equal(*results)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_in_one_pool_and_eager_calls_in_another(x):
    network, pool = Network("cuda"), torch.cuda.graph_pool_handle()
    want, captured = [network(x) for _ in range(3)][-1], []
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            captured.append((graph, network(x)))
    for graph, result in 3 * captured:
        graph.replay()
        with torch.cuda.use_mem_pool(torch.cuda.MemPool()):
            assert torch.equal(network(x), want)
        assert torch.equal(result, want)
    del captured, graph, result
    torch.cuda.empty_cache()
    assert torch.equal(network(x), want)
