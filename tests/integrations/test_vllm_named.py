"""The plugin of vLLM changes nothing where it is not asked for; this needs no vLLM."""

import pytest

from dskernels.integrations import vllm as plugin


@pytest.mark.parametrize(("plugins", "times"), [(None, 0), ("", 0), ("other", 0), ("dskernels", 1), ("a,dskernels", 1)])
def test_only_by_name(monkeypatch, plugins, times):
    calls = []
    monkeypatch.setattr(plugin, "register", lambda: calls.append(1))
    if plugins is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    plugin.register_if_named()
    assert len(calls) == times
