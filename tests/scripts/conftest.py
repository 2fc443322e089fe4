"""A recipe for the tiny pair, and a way to run commands on it."""

import json

import pytest
import yaml

from gift_trl.scripts.cli import run


@pytest.fixture
def recipe(tmp_path, pair, conversations):
    """Writes a recipe for the tiny pair; `None` removes a key."""
    data = tmp_path / "data.jsonl"
    rows = [
        {"question": row["prompt"][0]["content"], "answer": row["completion"][0]["content"]} for row in conversations
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**overrides) -> str:
        settings = {
            "model_name_or_path": pair[0],
            "instruct_model_name_or_path": pair[1],
            "dataset_name": str(data),
            "prompt_column": "question",
            "completion_column": "answer",
            "prompt_suffix": " Be brief.",
            "system_prompt": "You are a helpful assistant.",
            "use_peft": True,
            "lora_r": 4,
            "lora_target_modules": ["q_proj", "v_proj", "down_proj"],
            "lora_dropout": 0.0,
            "output_dir": str(tmp_path / "adapter"),
            "merge_output_dir": str(tmp_path / "merged"),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }
        settings.update(overrides)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with one message and the exit status 1; returns the message."""

    def fail(main, *argv: str) -> str:
        with pytest.raises(SystemExit) as status:
            run(main, list(argv))
        assert status.value.code == 1
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and "Traceback" not in error
        return error.split("error: ", 1)[1]

    return fail
