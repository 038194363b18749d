"""`torch.library.opcheck` for operations that take e4m3, which its schema check cannot compare."""

import torch

WITHOUT_SCHEMA = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check_registration(op, args):
    """Check schema, fake, autograd registration and functionalisation of a registered operation on these arguments."""
    if not any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float8_e4m3fn for arg in args):
        torch.library.opcheck(op, args)
        return
    torch.library.opcheck(op, args, test_utils=WITHOUT_SCHEMA)
    before = [arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    op(*args)
    for argument, was, now in zip(op._schema.arguments, before, args, strict=False):
        if isinstance(now, torch.Tensor) and not argument.is_write:
            assert torch.equal(was.double(), now.detach().double()), f"{argument.name} was written to"
