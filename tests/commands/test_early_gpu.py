import pytest
import torch

from trl_lightreasoner.commands import early_gpu


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(early_gpu, "_DRIVERS", ("/",))


@pytest.mark.parametrize("command", ["sample", "train", "run"])
def test_the_gpu_starts_in_a_thread_that_ends(driver, command):
    thread = early_gpu.start_gpu([command, "--output_dir", "folder"])
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "argv",
    [
        ["sample", "--help"],
        ["train", "--help-all"],
        ["train", "-h"],
        ["train", "--use_cpu", "true"],
        ["eval", "--use_vllm"],
        ["eval", "--use_vllm=true"],
        ["report"],
    ],
)
def test_nothing_starts_for_a_command_that_must_not_use_the_gpu(driver, argv):
    assert early_gpu.start_gpu(argv) is None


def test_nothing_starts_without_a_driver(monkeypatch):
    monkeypatch.setattr(early_gpu, "_DRIVERS", ("/no/such/device",))
    assert early_gpu.start_gpu(["sample"]) is None


def test_an_error_is_left_to_the_command(monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "device_count", fail)
    early_gpu._run_first_kernels()  # in the thread it would be printed
