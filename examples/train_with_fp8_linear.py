"""Train a small network whose products run in e4m3, forward and backward, beside the same network in bf16 or fp32."""

import torch
from torch import nn

import dskernels as ds

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
batch, width, steps = (4096, 2048, 100) if device == "cuda" else (128, 128, 20)


class Fp8Linear(nn.Linear):
    """A linear layer with the same parameters, and other arithmetic. The master weight keeps its dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ds.fp8_linear(x, self.weight, self.bias)


def losses_of(linear: type[nn.Linear]) -> list[float]:
    """Learn a fixed random function for some steps."""
    torch.manual_seed(0)
    options = {"device": device, "dtype": dtype}
    teacher = nn.Sequential(nn.Linear(width, width, **options), nn.Tanh(), nn.Linear(width, width, **options))
    student = nn.Sequential(linear(width, width, **options), nn.SiLU(), linear(width, width, **options))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        x = torch.randn(batch, width, **options)
        with torch.no_grad():
            y = teacher(x)
        loss = (student(x) - y).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


plain, fp8 = losses_of(nn.Linear), losses_of(Fp8Linear)
for step in range(0, steps, steps // 5):
    print(f"step {step:3}: loss {plain[step]:.5f} in {str(dtype).removeprefix('torch.')}, {fp8[step]:.5f} in e4m3")
print(f"last loss: {plain[-1]:.5f} and {fp8[-1]:.5f}")
assert fp8[-1] < 0.7 * fp8[0]
assert abs(fp8[-1] / plain[-1] - 1) < 0.05
