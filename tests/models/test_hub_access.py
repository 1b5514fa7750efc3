import contextlib
from pathlib import Path

import pytest
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import _http
from peft import LoraConfig, get_peft_model

from trl_lightreasoner.commands.merge import MergeArguments
from trl_lightreasoner.commands.merge import main as merge
from trl_lightreasoner.models import hub_access
from trl_lightreasoner.models.adapter_loading import load_adapter_config, load_generation_config
from trl_lightreasoner.models.hub_access import from_cache_if_unreachable
from trl_lightreasoner.models.loading import load_config, load_model, load_tokenizer
from trl_lightreasoner.steps.prompt_format import load_prompt_format
from trl_lightreasoner.steps.splits import load_split


COMMIT = "a" * 40


@pytest.fixture
def asked(monkeypatch):
    """The Hub, which is away; every time that it was asked."""
    requests = []

    class Session:
        def head(self, url, timeout):
            requests.append(url)
            raise ConnectionError("[Errno 111] Connection refused")

        def request(self, method, url, **kwargs):
            if is_offline_mode():
                raise OfflineModeIsEnabled
            self.head(url, timeout=None)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "_answer", None)
    for module in (hub_access, _http):
        monkeypatch.setattr(module, "get_session", Session)
    return requests


@from_cache_if_unreachable
def load(model) -> bool:
    return is_offline_mode()


@pytest.mark.usefixtures("propagated_logs")
def test_without_a_network_the_hub_is_asked_once_and_the_cache_is_read(asked, caplog):
    assert [load("me/expert"), load("me/amateur"), load("me/expert")] == [True] * 3
    assert asked == [constants.ENDPOINT]
    assert (
        "cannot be reached ([Errno 111] Connection refused): models and datasets are loaded from the cache."
        in caplog.text
    )


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


@pytest.mark.parametrize(
    "load",
    [load_config, load_tokenizer, load_adapter_config, load_generation_config, load_model, load_prompt_format],
)
def test_whatever_loads_from_the_hub_looks_there_once(load, asked):
    with contextlib.suppress(ValueError, OSError):
        load("me/not-in-the-cache")
    assert asked == [constants.ENDPOINT]


def test_a_merge_of_an_adapter_that_is_nowhere_asks_once(asked, tmp_path):
    with pytest.raises(ValueError, match="'me/adapter' is not an adapter"):
        merge(MergeArguments("me/adapter", str(tmp_path / "model")))
    assert asked == [constants.ENDPOINT]


@pytest.mark.parametrize("of_hub", [["adapter"], ["base"], ["adapter", "base"]])
def test_a_merge_of_what_is_in_the_cache_asks_once(of_hub, asked, expert, expert_path, tmp_path, monkeypatch):
    folders = {"adapter": tmp_path / "adapter", "base": Path(expert_path)}
    get_peft_model(expert, LoraConfig(target_modules=["q_proj"])).save_pretrained(folders["adapter"])
    for role in of_hub:
        repository = tmp_path / "cache" / f"models--me--{role}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "snapshots" / COMMIT).symlink_to(folders[role], target_is_directory=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    adapter, base = (f"me/{role}" if role in of_hub else str(folders[role]) for role in ("adapter", "base"))
    merge(MergeArguments(adapter, str(tmp_path / "model"), base_model_name_or_path=base))
    assert asked == [constants.ENDPOINT]
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_without_a_network_a_dataset_is_looked_for_in_the_cache_at_once(asked):
    with pytest.raises(ValueError, match="^The dataset 'me/questions' cannot be loaded: Couldn't reach .* in the ca"):
        load_split("me/questions", None, "train")
    assert asked == [constants.ENDPOINT]
    assert not is_offline_mode()
