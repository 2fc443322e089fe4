"""Helpers of the training tests."""

import gc

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from gift_trl import GIFTConfig, GIFTSFTTrainer


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """The trainer collects garbage at every start, half of the time of these tests: what is imported is no garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def lora() -> LoraConfig:
    # Random A and B: with B = 0, as LoRA starts, half of the gradients would be zero whatever the loss
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture
def config(tmp_path, pair):
    """A configuration in which nothing hides an error of scale: SGD, no clipping, float32, constant rate."""

    def make(**overrides) -> GIFTConfig:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "instruct_model_name_or_path": pair[1],
            "per_device_train_batch_size": 8,
            "optim": "sgd",
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "bf16": False,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return GIFTConfig(**{**settings, **overrides})

    return make


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of the trainable parameters and their values of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self.gradients = {name: p.grad.clone() for name, p in trainable.items()}
            self.state_dict = {name: p.detach().clone() for name, p in trainable.items()}


@pytest.fixture
def run(pair, lora):
    """Trains and returns the trainer, with the gradients of its first step in `trainer.recorder`."""

    def train(args: GIFTConfig, dataset, trainer_class=GIFTSFTTrainer, **kwargs):
        kwargs.setdefault("peft_config", lora)
        trainer = trainer_class(model=pair[0], args=args, train_dataset=dataset, **kwargs)
        trainer.recorder = GradientRecorder()
        trainer.add_callback(trainer.recorder)
        trainer.train()
        return trainer

    return train


@pytest.fixture
def adapter_weights():
    def get(trainer) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    return get
