"""The routing references against Python's own arithmetic and against transformers' routers, in fp64 unless said."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import routing_oracle as oracle
from dskernels.reference import routing as reference

EXACT = {"rtol": 1e-12, "atol": 1e-14}
NAN, INF = math.nan, math.inf


def check_route(logits, bias=None, **options):
    """Compare with the oracle; the ids bitwise, since in fp64 both see the very same scores, up to the last bits."""
    result = reference.route(logits, bias, **options)
    bias_list = None if bias is None else bias.tolist()
    weights, experts, load, nonfinite, gaps = oracle.route(logits.tolist(), bias_list, **options)
    clear = torch.tensor(gaps) > 1e-12
    clear |= torch.tensor(gaps) == 0
    assert clear.all(), "the case leaves a choice to the last bit"
    assert result.experts.tolist() == experts
    torch.testing.assert_close(result.weights, torch.tensor(weights, dtype=result.weights.dtype), **EXACT)
    assert result.load.tolist() == load
    assert result.nonfinite.item() == nonfinite
    return result


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_groups", "top_groups"),
    [
        (2, 1, 1, 1),  # the smallest
        (6, 6, 1, 1),  # every expert
        (6, 3, 6, 4),  # one expert a group
        (12, 5, 4, 3),  # groups of three, and of no power of two
        (16, 8, 4, 2),  # every expert of the groups that are kept
        (160, 6, 8, 3),  # DeepSeek-V2
        (256, 8, 8, 4),  # DeepSeek-V3
        (384, 8, 1, 1),  # Kimi-K2
    ],
)
def test_route(n_experts, top_k, n_groups, top_groups, score, normalize):
    logits = 2 * torch.randn(17, n_experts, dtype=torch.float64)
    bias = torch.randn(n_experts, dtype=torch.float64)
    options = dict(top_k=top_k, n_groups=n_groups, top_groups=top_groups, score=score, normalize=normalize, scale=2.5)
    check_route(logits, bias, **options)
    check_route(logits, **options)


def test_the_example_of_the_docs():
    """Every number of the worked example of docs/routing.md, in the order in which it is told."""
    page = (Path(__file__).parent.parent / "docs" / "routing.md").read_text()

    def told(numbers, sep=" | "):
        return sep.join(f"{x:.3f}" for x in numbers) in page

    logits, bias = torch.tensor([[2.0, -1.0, 1.0, 0.5, 0.0, 1.5]]), torch.tensor([-0.3, 0.0, 0.1, 0.0, 0.2, -0.4])
    s = logits[0].sigmoid()
    assert told(s)
    assert told(s + bias)
    assert "0.850, 1.454 and 1.118" in page
    torch.testing.assert_close((s + bias).view(3, 2).sum(1), torch.tensor([0.850, 1.454, 1.118]), rtol=0, atol=5e-4)
    routed = check_route(logits.double(), bias.double(), top_k=3, n_groups=3, top_groups=2, scale=2.5)
    assert routed.experts.tolist() == [[2, 4, 3]]
    assert "2 (0.831), 4 (0.700), 3 (0.622)" in page
    assert f"sum {s[[2, 3, 4]].sum():.3f}" in page
    assert "0.986, 0.674 and 0.840" in page
    torch.testing.assert_close(routed.weights[0].float(), torch.tensor([0.986, 0.674, 0.840]), rtol=0, atol=5e-4)


def test_gates_keep_their_digits_under_a_large_bias():
    # s + 12 in fp32 leaves s with 2^-20: gates recovered as (s + b) - b would be 0 here.
    logits = torch.linspace(-18, -15, 8)[None]
    routed = reference.route(logits, torch.full((8,), 12.0), top_k=3)
    weights = logits.double().sigmoid()[0, routed.experts[0].long()]
    torch.testing.assert_close(routed.weights[0].double(), weights / weights.sum(), rtol=1e-6, atol=0)


def test_a_negative_bias_does_not_lift_experts_of_other_groups():
    # Masked with 0 instead of -inf, group 1 would win over the -11.x of group 0.
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    bias = torch.full((4,), -12.0, dtype=torch.float64)
    routed = check_route(logits, bias, top_k=2, n_groups=2, top_groups=1)
    assert routed.experts.tolist() == [[0, 1]]


def test_ties_go_to_the_smaller_id():
    same = torch.zeros(3, 12, dtype=torch.float64)
    assert check_route(same, top_k=5, n_groups=4, top_groups=2).experts.tolist() == [[0, 1, 2, 3, 4]] * 3
    # Group 0 holds its maximum twice, group 1 holds it once: the second largest decides, and the copy counts.
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.5, 0.9, 1.0, 1.0, 0.0]], dtype=torch.float64)
    routed = check_route(logits, top_k=4, n_groups=3, top_groups=2)
    assert routed.experts.tolist() == [[0, 1, 6, 7]]
    assert check_route(logits, top_k=3, n_groups=3, top_groups=1).experts.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_rows_without_a_choice_are_counted_and_weigh_nothing(score):
    logits = torch.randn(5, 8, dtype=torch.float64)
    logits[1, 3] = NAN
    logits[2] = -INF
    logits[3, ::2], logits[3, 1::2] = INF, -INF
    routed = check_route(logits, top_k=3, n_groups=4, top_groups=2, score=score)
    assert routed.nonfinite == 3
    assert routed.experts[1:4].tolist() == [[0, 1, 2]] * 3
    assert not routed.weights[1:4].any()
    assert routed.load.sum() == 2 * 3


def test_infinite_logits_count_as_very_large_ones():
    logits = torch.tensor([[0.5, INF, -INF, 1.0, -1.0], [-INF, -INF, 2.0, -INF, -INF], [INF, 0.0, INF, 1.0, 2.0]])
    logits = logits.double().requires_grad_()
    sigmoid = check_route(logits.detach(), top_k=3)
    assert sigmoid.experts.tolist() == [[1, 3, 0], [2, 0, 1], [0, 2, 4]]
    softmax = check_route(logits.detach(), top_k=3, score="softmax")
    assert softmax.weights[0].tolist() == [1, 0, 0]
    assert softmax.weights[2].tolist() == [0.5, 0.5, 0]
    for score in ("sigmoid", "softmax"):
        weights = reference.route(logits, top_k=3, score=score).weights
        (grad,) = torch.autograd.grad((weights * torch.tensor([1.0, 2.0, 3.0])).sum(), logits)
        assert grad.isfinite().all()
        assert not grad[logits.isinf()].any()


def test_a_bias_of_minus_infinity_takes_an_expert_last_of_its_groups():
    bias = torch.tensor([0.0, -INF, 0.0, 0.0, 0.0, 0.0])
    logits = torch.tensor([[9.0, 9.0, 9.0, 5.0, 4.0, 3.0]])
    assert reference.route(logits, bias, top_k=6).experts.tolist() == [[0, 2, 3, 4, 5, 1]]
    assert reference.route(logits, bias, top_k=3, n_groups=2).experts.tolist() == [[0, 2, 1]]
    bias[2] = -INF  # the second best of group 0
    assert reference.route(logits, bias, top_k=3, n_groups=2).experts.tolist() == [[3, 4, 5]]
    bias[:] = -INF
    assert reference.route(logits, bias, top_k=3, n_groups=2).experts.tolist() == [[0, 1, 2]]
    bias[4] = 0.0  # a group with one expert left comes before one with none
    assert reference.route(logits, bias, top_k=2, n_groups=2).experts.tolist() == [[4, 3]]


def test_a_bias_of_nan_makes_every_row_void():
    routed = reference.route(torch.randn(3, 4), torch.tensor([0.0, NAN, 0.0, 0.0]), top_k=2)
    assert routed.experts.tolist() == [[0, 1]] * 3
    assert routed.nonfinite == 3
    assert not routed.weights.any()
    assert not routed.load.any()


def test_affinities_too_small_to_normalise_weigh_nothing():
    logits = torch.tensor([[-80.0, -90.0, -200.0], [-60.0, -61.0, -200.0]], requires_grad=True)
    weights = reference.route(logits, top_k=2).weights
    assert weights[0].tolist() == [0, 0]
    torch.testing.assert_close(weights[1].sum(), torch.tensor(1.0))
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    assert grad.isfinite().all()
    assert grad[1, 0] > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_taken_in_fp32(dtype):
    logits = torch.randn(9, 16).to(dtype)
    low, single = (reference.route(x, top_k=4, normalize=False) for x in (logits, logits.float()))
    assert low.weights.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(low, single, strict=True))


def test_no_tokens():
    routed = reference.route(torch.empty(0, 12), torch.zeros(12), top_k=3, n_groups=4, top_groups=2)
    assert [tuple(x.shape) for x in routed] == [(0, 3), (0, 3), (12,), ()]
    assert not routed.load.any()
    assert routed.nonfinite == 0


# Scores of 0, 1/2, 1 - 4e-18 (which is 1) and biases in halves: they tie everywhere, and every sum is exact.
@given(st.data())
def test_route_with_many_ties(data):
    n_groups, width = data.draw(st.sampled_from([(1, 7), (3, 1), (4, 3), (5, 2), (2, 8)]))
    n = n_groups * width
    top_groups = data.draw(st.integers(1, n_groups))
    top_k = data.draw(st.integers(1, top_groups * width))
    values = st.sampled_from([0.0, 0.0, 40.0, -800.0, -INF, INF, NAN])
    logits = data.draw(st.lists(st.lists(values, min_size=n, max_size=n), max_size=4))
    bias = data.draw(st.none() | st.lists(st.sampled_from([-12.0, -1.0, 0.0, 0.5, 12.0]), min_size=n, max_size=n))
    logits_TE = torch.tensor(logits, dtype=torch.float64).view(len(logits), n)
    bias_E = None if bias is None else torch.tensor(bias, dtype=torch.float64)
    options = dict(top_k=top_k, n_groups=n_groups, top_groups=top_groups)
    result = reference.route(logits_TE, bias_E, **options)
    weights, experts, load, nonfinite, _ = oracle.route(logits, bias, **options)
    assert result.experts.tolist() == experts
    torch.testing.assert_close(result.weights, torch.tensor(weights, dtype=torch.float64).view(-1, top_k), **EXACT)
    assert result.load.tolist() == (load or [0] * n)
    assert result.nonfinite == nonfinite


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_gradient_of_route(score, normalize):
    logits = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    options = dict(top_k=4, n_groups=4, top_groups=2, score=score, normalize=normalize, scale=2.5)
    assert torch.autograd.gradcheck(lambda x: reference.route(x, None, **options).weights, logits)


def test_void_rows_get_no_gradient():
    logits = torch.randn(3, 6, dtype=torch.float64)
    logits[1, 2] = NAN
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(reference.route(logits, top_k=2, normalize=False).weights.sum(), logits)
    assert not grad[1].any()
    assert (grad[[0, 2]] != 0).sum() == 4


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "lengths",
    [
        [11],
        [3, 8],
        [1, 4, 2],  # the last four tokens belong to no sequence
        [5, 0, 0, 6],  # sequences without a token are not averaged over
        [4, 100],  # more than there are
        [4, -3, 5],  # a negative length is an empty sequence
        [0, 0],
        [],
    ],
)
def test_balance_loss(lengths, score):
    logits = torch.randn(11, 6, dtype=torch.float64)
    logits[3] = NAN  # a padding row counts for nothing
    logits[4, 1] = -INF
    logits.requires_grad_()
    lengths_S = torch.tensor(lengths, dtype=torch.int32)
    options = dict(top_k=2, alpha=0.1, sequence_lengths=lengths_S, score=score)
    loss = reference.balance_loss(logits, **options)
    assert loss.shape == ()
    expected = oracle.balance_loss(logits.tolist(), 2, 0.1, lengths, score)
    torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64), **EXACT)
    (grad,) = torch.autograd.grad(loss, logits)
    inside = torch.arange(11) < sum(max(n, 0) for n in lengths)
    inside[3] = False
    assert grad.isfinite().all()
    assert (grad.abs().sum(1) > 0).tolist() == inside.tolist()


def test_balance_loss_of_an_even_load_is_alpha():
    # Each expert is chosen equally often and has an equal share: f = 1, P = 1 / E, sum = 1.
    logits = torch.eye(6, dtype=torch.float64) * 3
    logits = logits + logits.roll(1, 1)
    lengths = torch.tensor([6], dtype=torch.int32)
    loss = reference.balance_loss(logits, top_k=2, alpha=0.01, sequence_lengths=lengths)
    torch.testing.assert_close(loss, torch.tensor(0.01, dtype=torch.float64))
    logits[:] = logits[0]
    assert reference.balance_loss(logits, top_k=2, alpha=0.01, sequence_lengths=lengths) > 0.012


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_gradient_of_balance_loss(score):
    logits = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, 2], dtype=torch.int32)
    options = dict(top_k=2, alpha=0.1, sequence_lengths=lengths, score=score)
    assert torch.autograd.gradcheck(lambda x: reference.balance_loss(x, **options), logits)


def test_update_bias():
    # The mean load is 7/3, no integer; and an expert of just the mean load stays.
    bias = torch.tensor([0.5, -0.5, 12.0])
    assert reference.update_bias(bias, torch.tensor([2, 3, 2], dtype=torch.int32), 0.25) is bias
    assert bias.tolist() == [0.75, -0.75, 12.25]
    reference.update_bias(bias, torch.tensor([4, 2, 0], dtype=torch.int32), 0.25)
    assert bias.tolist() == [0.5, -0.75, 12.5]
    reference.update_bias(bias, torch.full((3,), 2**31 - 1, dtype=torch.int32), 0.25)
    assert bias.tolist() == [0.5, -0.75, 12.5]


def test_update_bias_evens_out_a_skewed_load():
    torch.manual_seed(0)
    logits = torch.randn(512, 8) + torch.linspace(-1, 1, 8)
    bias = torch.zeros(8)
    first = reference.route(logits, bias, top_k=2).load
    for _ in range(300):
        reference.update_bias(bias, reference.route(logits, bias, top_k=2).load, 0.002)
    last = reference.route(logits, bias, top_k=2).load
    assert first.max() > 1.5 * first.float().mean()
    assert last.max() < 1.1 * last.float().mean()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_groups", "top_groups"), [(16, 4, 4, 2), (256, 8, 8, 4), (24, 3, 1, 1)]
)
def test_route_is_that_of_transformers_deepseek_v3(n_experts, top_k, n_groups, top_groups, normalize):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=32,
        n_routed_experts=n_experts,
        num_experts_per_tok=top_k,
        n_group=n_groups,
        topk_group=top_groups,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    router = modeling.DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.randn(n_experts))
    hidden = torch.randn(64, 32)
    with torch.no_grad():
        logits, weights, experts = router(hidden)
    options = dict(top_k=top_k, n_groups=n_groups, top_groups=top_groups, normalize=normalize, scale=2.5)
    ours = reference.route(logits, router.e_score_correction_bias, **options)
    # transformers leaves the order of the chosen open.
    order = ours.experts.long().argsort(-1), experts.argsort(-1)
    assert torch.equal(ours.experts.long().gather(1, order[0]), experts.gather(1, order[1]))
    torch.testing.assert_close(ours.weights.gather(1, order[0]), weights.gather(1, order[1]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n_groups", "top_groups", "method"), [(8, 3, "group_limited_greedy"), (1, 1, "greedy")])
def test_route_is_that_of_transformers_deepseek_v2(n_groups, top_groups, method):
    modeling = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    from transformers import DeepseekV2Config

    config = DeepseekV2Config(
        hidden_size=32,
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_group=n_groups,
        topk_group=top_groups,
        topk_method=method,
        routed_scaling_factor=16.0,
    )
    router = modeling.DeepseekV2TopkRouter(config)
    torch.nn.init.normal_(router.weight, std=0.2)
    hidden = torch.randn(64, 32)
    with torch.no_grad():
        logits, weights, experts = router(hidden)
    options = dict(top_k=6, n_groups=n_groups, top_groups=top_groups, score="softmax", normalize=False, scale=16.0)
    ours = reference.route(logits, **options)
    order = ours.experts.long().argsort(-1), experts.argsort(-1)
    assert torch.equal(ours.experts.long().gather(1, order[0]), experts.gather(1, order[1]))
    torch.testing.assert_close(ours.weights.gather(1, order[0]), weights.gather(1, order[1]), rtol=1e-6, atol=0)
