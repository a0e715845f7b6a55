"""The fine-tuning script in two processes, as `accelerate launch` starts it, gives the losses of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from paths import SUPPORT
from patience import PATIENCE
from safetensors.torch import load_file
from tiny_training import (
    SCRIPT,
    TEXT_SAMPLE,
    finetune,
    rows_with_pictures,
    tiny_model,
    tiny_processor,
    write_data,
)

CONFIGS = SCRIPT.parent / "accelerate"
FSDP_ON_CPU = SUPPORT / "fsdp_on_cpu.py"
STEPS = 3


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list:
    """3 steps of 4 samples, over one epoch's end; a text alone fills a batch of one process now and then."""
    folder = tmp_path_factory.mktemp("start")
    model = tiny_model()
    model.config.text_config.l2_wrap = 0.0  # its pull depends on the micro-batch's size, as the original's
    model.save_pretrained(folder / "model")
    tiny_processor(model).save_pretrained(folder / "model")
    data = write_data(folder, [*rows_with_pictures(folder, 5), *[TEXT_SAMPLE] * 3])
    # With SGD a rounding of a gradient stays one in the weights; AdamW would divide it by itself.
    recipe = ["--preset", "stage2", "--optim", "sgd", "--learning-rate", 0.1, "--learning-rate-final", 0.1]
    times = ["--max-steps", STEPS, "--save-steps", 2, "--logging-steps", 1, "--report-to", "none"]
    return ["--model", folder / "model", "--data", data, "--use-cpu", *recipe, *times]


def in_two_processes(config: str, *arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    options = ["--num_processes", 2, "--mixed_precision", "no", "--main_process_port", 0]
    script = [SCRIPT] if config == "ddp.yaml" else [FSDP_ON_CPU, SCRIPT]
    command = [str(part) for part in (*launch, *options, *script, *arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]


def log_of(folder: Path, name: str) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "reduction"), [("ddp.yaml", "sample"), ("fsdp2.yaml", "token")])
def test_two_processes_give_the_losses_of_one(config, reduction, command, tmp_path):
    """Float32: sums in another order; 1e-5 of the losses and weights is allowed."""
    one, two = tmp_path / "one", tmp_path / "two"
    command = [*command, "--loss-reduction", reduction]
    sizes = ["--per-device-train-batch-size", "--gradient-accumulation-steps"]
    finetune(*command, "--output-dir", one, sizes[0], 4, sizes[1], 1)
    in_two_processes(config, *command, "--output-dir", two, sizes[0], 1, sizes[1], 2)

    for name in ("loss", "grad_norm"):
        expected = log_of(one, name)
        assert len(expected) == STEPS
        assert log_of(two, name) == pytest.approx(expected, rel=1e-5), name
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    names = {path.name for path in (two / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert ("pytorch_model_fsdp.bin" in names) == (config == "fsdp2.yaml")
    assert not list(two.glob("_*"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_ones_of_accelerate(path):
    """DeepSpeed's are read, not run: it needs a GPU."""
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and config.num_processes == 8
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= known
    assert set(config.deepspeed_config) <= known
    assert bool(config.deepspeed_config) == path.stem.startswith("deepspeed")
