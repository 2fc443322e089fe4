import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from gift_trl.planning.memory import TrainingSetup, training_memory
from gift_trl.planning.placement import Placement
from gift_trl.planning.stages import Batch
from gift_trl.scripts.launch import accelerate_config_file


CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    vocab_size=1000,
)
LORA = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
LAYER = 128 * 128 * 2 + 128 * 64 * 2 + 128 * 256 * 3 + 2 * 128
LINEAR = 3 * (LAYER - 2 * 128)
OUTSIDE = 2 * 1000 * 128 + 128  # embedding, head, last norm
WEIGHTS = 3 * LAYER + OUTSIDE
BATCH = Batch(2, 64, 126)


@pytest.fixture(scope="module")
def setup() -> TrainingSetup:
    return TrainingSetup(CONFIG, LORA)


@pytest.fixture(scope="module")
def adapter() -> int:
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(CONFIG), LORA)
    return model.num_parameters() - WEIGHTS


def test_one_gpu_holds_weights_gradients_and_moments(setup, adapter):
    assert (setup.sizes.parameters, setup.sizes.trained) == (WEIGHTS, adapter)
    memory = training_memory(setup, BATCH, Placement("single", 1))
    # float32: itself, its gradient, two moments
    assert (memory.weights, memory.adapter, memory.buffers, memory.host) == (2 * WEIGHTS, 16 * adapter, 0, 0)
    assert memory.total == memory.weights + memory.adapter + memory.activations
    ddp = training_memory(setup, BATCH, Placement("ddp", 4))
    assert ddp.buffers == 4 * adapter and ddp.total == memory.total + ddp.buffers


def test_zero_shares_out_state_gradients_and_parameters(setup, adapter):
    memories = {stage: training_memory(setup, BATCH, Placement("zero", 4, zero_stage=stage)) for stage in (1, 2, 3)}
    # bf16 parameters and gradients, and the float32 copy, its gradient and two moments
    for stage, share in ((1, 2 + 2 + 16 / 4), (2, 2 + 2 / 4 + 16 / 4), (3, 2 / 4 + 2 / 4 + 16 / 4)):
        assert memories[stage].adapter == pytest.approx(share * adapter, abs=1)
        assert memories[stage].activations == memories[1].activations
    assert memories[1].weights == memories[2].weights == 2 * WEIGHTS
    assert memories[3].weights == WEIGHTS / 2
    bucket = 2 * 500_000_000
    # So small a model is kept gathered as a whole
    assert (memories[2].buffers, memories[3].buffers) == (bucket, bucket + 2 * WEIGHTS)
    offload = training_memory(setup, BATCH, Placement("zero3_offload", 4, 3, False, True, True))
    assert (offload.weights, offload.adapter) == (0, pytest.approx(2 / 4 * adapter, abs=1))
    assert offload.host == pytest.approx(WEIGHTS / 2 + (2 / 4 + 12 / 4 + 4 / 4) * adapter, abs=2)


def test_fsdp_gathers_the_next_layer_and_keeps_what_is_in_none(setup, adapter):
    memory = training_memory(setup, BATCH, Placement("fsdp2", 4, fsdp=True))
    assert (memory.weights, memory.adapter) == (WEIGHTS / 2, 16 * adapter / 4)
    assert memory.buffers == 2 * (OUTSIDE + 2 * LAYER)


def test_quantised_weights_take_half_a_byte_and_their_scales(adapter):
    memory = training_memory(TrainingSetup(CONFIG, LORA, load_in_4bit=True), BATCH, Placement("single", 1))
    assert memory.adapter == 8 * adapter
    assert memory.weights == pytest.approx(2 * (WEIGHTS - LINEAR) + LINEAR * (0.5 + 1 / 64 + 1 / 4096), abs=1)


def test_a_model_that_is_trained_whole_counts_once():
    memory = training_memory(TrainingSetup(CONFIG, None), BATCH, Placement("single", 1))
    assert (memory.weights, memory.adapter) == (0, 2 * 4 * WEIGHTS)


def test_configurations_that_are_shipped():
    found = {
        name: Placement.from_file(accelerate_config_file(name), 8)
        for name in ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "two_nodes")
    }
    assert [placement.processes for placement in found.values()] == [1, *[8] * 7]
    stages = [placement.zero_stage for placement in found.values()]
    assert stages == [0, 0, 1, 2, 3, 3, 0, 3]
    assert [name for name, placement in found.items() if placement.fsdp] == ["fsdp2"]
    offloads = [name for name, p in found.items() if p.offload_parameters and p.offload_optimizer]
    assert offloads == ["zero3_offload"]


def test_other_launchers_are_refused(tmp_path):
    path = tmp_path / "tpu.yaml"
    path.write_text("distributed_type: XLA\n")
    with pytest.raises(ValueError, match="`distributed_type` XLA"):
        Placement.from_file(path, 8)
    path.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n")
    with pytest.raises(ValueError, match="no `zero_stage`"):
        Placement.from_file(path, 8)
