"""Data and recipe of an endurance run."""

import json
import random
from pathlib import Path


_WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
_RECIPE = """\
model_name_or_path: {folder}/pair/base
instruct_model_name_or_path: {folder}/pair/instruct
dtype: float32
dataset_name: {folder}/data.jsonl
prompt_column: instruction
completion_column: response
max_length: 256
eos_confidence: null
use_peft: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.1
lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
output_dir: adapter
learning_rate: 3.0e-3
max_steps: 8
per_device_train_batch_size: 2
bf16: false
gradient_checkpointing: false
use_cpu: true
logging_steps: 1
save_strategy: steps
save_steps: 1
save_total_limit: 3
report_to: none
resume_from_checkpoint: auto
seed: 0
disable_tqdm: true
"""


def make_inputs(folder: Path) -> None:
    """Writes the data, the recipe, and a file for `gift-trl make-pair`."""
    rng = random.Random(0)
    rows = []
    for _ in range(64):
        a, b = rng.randrange(100), rng.randrange(100)
        asked = " ".join(rng.choices(_WORDS, k=rng.randrange(1, 6)))
        answer = " ".join(rng.choices(_WORDS, k=rng.randrange(1, 20)))
        rows.append(
            {"instruction": f"Add {a} and {b}, then say {asked}.", "response": f"{a} + {b} = {a + b}. {answer}"}
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(_RECIPE.format(folder=folder))
