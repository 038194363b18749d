"""Arguments that a kernel does not take: refused by name where it is asked for, and run by another where it is not."""

import pytest
import torch


def check_refused(function, arguments, device, reason):
    """Check that the portable kernel refuses these arguments for this reason, and that the operation takes them."""
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=f"{function.__name__}: impl='triton' cannot run this: .*{reason}"):
        function(**arguments, impl="triton")
    function(**arguments)
