"""The mixture of experts: a router, and the block of router, experts and shared experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dskernels as ds
from dskernels.types import Routing


class Router(nn.Module):
    """Chooses experts for each token, see `dskernels.route_hidden`.

    Args:
        hidden_size: width of the tokens.
        n_experts: number of experts to choose from.
        top_k: number of experts chosen for a token.
        n_groups: number of groups of consecutive experts.
        top_groups: a token chooses from this many of the groups.
        score: "sigmoid" (DeepSeek-V3, with a bias for the choice) or "softmax" (without).
        normalize: whether the weights of a token sum to `scale`.
        scale: factor on the weights.
        device: of the parameters.
        dtype: of the weight.

    Attributes:
        weight: ``[n_experts, hidden_size]``.
        e_score_correction_bias: float32 ``[n_experts]``, see `dskernels.update_bias`; None with softmax.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        n_experts: int,
        top_k: int,
        *,
        n_groups: int = 1,
        top_groups: int = 1,
        score: str = "sigmoid",
        normalize: bool = True,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.top_k, self.n_groups, self.top_groups = top_k, n_groups, top_groups
        self.score, self.normalize, self.scale = score, normalize, scale
        self.weight = nn.Parameter(torch.empty(n_experts, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        bias = torch.zeros(n_experts, dtype=torch.float32, device=device) if score == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Routing, Tensor]:
        """The choice for ``[T, hidden_size]``, and the logits, float32 ``[T, n_experts]``."""
        bias = self.e_score_correction_bias
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.float()  # `.to(bfloat16)` rounded it: load the weights after that
        return ds.route_hidden(
            x,
            self.weight,
            bias,
            top_k=self.top_k,
            n_groups=self.n_groups,
            top_groups=self.top_groups,
            score=self.score,
            normalize=self.normalize,
            scale=self.scale,
        )


class Mlp(nn.Module):
    """The weights of a gated network, named as in checkpoints."""

    def __init__(self, hidden_size: int, inner: int, **options: object) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner, bias=False, **options)
        self.up_proj = nn.Linear(hidden_size, inner, bias=False, **options)
        self.down_proj = nn.Linear(inner, hidden_size, bias=False, **options)


class Experts(nn.Module):
    """Stacked weights, named as in transformers: ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``.

    A state dict with the names of published checkpoints, ``E.gate_proj.weight`` and so on, loads too.
    """

    def __init__(self, n_experts: int, hidden_size: int, inner: int, **options: object) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * inner, hidden_size, **options))  # type: ignore[call-overload]
        self.down_proj = nn.Parameter(torch.empty(n_experts, hidden_size, inner, **options))  # type: ignore[call-overload]
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=inner**-0.5)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """Stack the weights of experts that are stored one by one."""
        one_by_one = [key for key in state_dict if key.startswith(prefix) and key[len(prefix)].isdigit()]
        given = {key: state_dict.pop(key) for key in one_by_one}
        if given:
            gate, up, down = (
                torch.stack([given[f"{prefix}{i}.{name}_proj.weight"] for i in range(self.down_proj.shape[0])])
                for name in ("gate", "up", "down")
            )
            state_dict[f"{prefix}gate_up_proj"] = torch.cat((gate, up), 1)
            state_dict[f"{prefix}down_proj"] = down
        super()._load_from_state_dict(state_dict, prefix, *args)


class MoE(nn.Module):
    """Every token goes through the experts that a router chooses and through the shared ones, see
    `dskernels.fused_experts`.

    Args:
        hidden_size: width of the tokens.
        inner: width of an expert.
        n_experts: number of routed experts.
        top_k: number of experts chosen for a token.
        n_shared: number of shared experts; their weights are one network, `n_shared` times as wide.
        fp8: multiply in e4m3, forward and backward; the weights stay as they are.
        device: of the parameters.
        dtype: of the parameters.
        router: further options of `Router`.

    Attributes:
        gate: the router.
        experts: stacked weights.
        shared_experts: ``gate_proj``, ``up_proj`` and ``down_proj``, or None.
    """

    shared_experts: Mlp | None

    def __init__(
        self,
        hidden_size: int,
        inner: int,
        n_experts: int,
        top_k: int,
        *,
        n_shared: int = 0,
        fp8: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router: object,
    ) -> None:
        super().__init__()
        self.fp8 = fp8
        options = {"device": device, "dtype": dtype}
        self.gate = Router(hidden_size, n_experts, top_k, **options, **router)  # type: ignore[arg-type]
        self.experts = Experts(n_experts, hidden_size, inner, **options)
        self.shared_experts = Mlp(hidden_size, n_shared * inner, **options) if n_shared else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape; the router's results are left in ``self.routing`` and
        ``self.logits``.

        `dskernels.update_bias` and `dskernels.balance_loss` take these.
        """
        tokens = x.reshape(-1, x.shape[-1])
        self.routing, self.logits = self.gate(tokens)
        shared = None
        if self.shared_experts is not None:
            mlp = self.shared_experts
            shared = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), mlp.down_proj.weight
        experts = self.experts
        out = ds.fused_experts(
            tokens, experts.gate_up_proj, experts.down_proj, self.routing, shared=shared, fp8=self.fp8
        )
        return out.view(x.shape)
