import os

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


@pytest.mark.parametrize("setting", ["use_cpu: true", "use_vllm : true", "env: {CUDA_VISIBLE_DEVICES: '1'}"])
@pytest.mark.parametrize("flag", [["--config", "{}"], ["--config={}"]])
def test_nothing_starts_if_the_config_file_says_so(driver, flag, setting, tmp_path):
    path = tmp_path / "config.yaml"
    argv = ["sample", *(each.format(path) for each in flag)]
    path.write_text(f"\ufeffbeta: 0.4\n# {setting}\n")
    early_gpu.start_gpu(argv).join()
    path.write_text(f"\ufeff{setting}\nbeta: 0.4\n")
    assert early_gpu.start_gpu(argv) is None


@pytest.mark.parametrize("argv", [["sample", "--config"], ["sample", "--config", "/no/such/file"]])
def test_a_config_file_that_cannot_be_read_is_left_to_the_command(driver, argv):
    early_gpu.start_gpu(argv).join()


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="a shell without `<(...)`")
def test_a_config_that_is_a_pipe_is_left_to_the_command(driver):
    reader, writer = os.pipe()
    os.write(writer, b"use_cpu: true")
    os.close(writer)
    early_gpu.start_gpu(["sample", "--config", f"/dev/fd/{reader}"]).join()
    assert os.read(reader, 100) == b"use_cpu: true"
    os.close(reader)


def test_nothing_starts_without_a_driver(monkeypatch):
    monkeypatch.setattr(early_gpu, "_DRIVERS", ("/no/such/device",))
    assert early_gpu.start_gpu(["sample"]) is None


def test_an_error_is_left_to_the_command(monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "device_count", fail)
    early_gpu._run_first_kernels()  # in the thread it would be printed
