import contextlib

import pytest
from huggingface_hub import constants, is_offline_mode

from trl_lightreasoner.models import hub_access, loading
from trl_lightreasoner.models.hub_access import from_cache_if_unreachable


@pytest.fixture
def asked(monkeypatch):
    """The Hub, which is away; every time that it was asked."""
    requests = []

    class Session:
        def head(self, url, timeout):
            requests.append(url)
            raise ConnectionError("[Errno 111] Connection refused")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "_answer", None)
    monkeypatch.setattr(hub_access, "get_session", Session)
    return requests


@from_cache_if_unreachable
def load(model) -> bool:
    return is_offline_mode()


@pytest.mark.usefixtures("propagated_logs")
def test_without_a_network_the_hub_is_asked_once_and_the_cache_is_read(asked, caplog):
    assert [load("me/expert"), load("me/amateur"), load("me/expert")] == [True] * 3
    assert asked == [constants.ENDPOINT]
    assert "cannot be reached ([Errno 111] Connection refused): models are loaded from the cache." in caplog.text


def test_uploading_later_is_not_kept_from_the_network(asked):
    load("me/expert")
    assert not is_offline_mode()


def test_the_hub_is_asked_again_after_some_minutes(asked, monkeypatch):
    load("me/expert")
    monkeypatch.setattr(hub_access, "_SECONDS", 0)
    load("me/expert")
    assert len(asked) == 2


def test_for_what_lies_on_this_machine_nobody_is_asked(asked, expert_path, expert):
    assert [load(expert_path), load(expert)] == [False] * 2 and not asked


def test_every_way_to_load_from_the_hub_looks_there_first(asked):
    for name in ("load_config", "load_tokenizer", "load_adapter_config", "load_generation_config", "load_model"):
        with contextlib.suppress(ValueError, OSError):
            getattr(loading, name)("me/not-in-the-cache")
    assert asked == [constants.ENDPOINT]
