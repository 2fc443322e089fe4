"""`push_to_hub` of the trainer alone, without `MergeAndPushCallback`: the pushes of SFTTrainer, and a file of GIFT's more."""

from pathlib import Path
from types import SimpleNamespace

import transformers.trainer
from transformers import AutoTokenizer
from trl import SFTTrainer

from gift_trl import GIFTSFTTrainer
from gift_trl.checkpoints import TRAINING_FILE


class Hub:
    """A client that notes what it is asked to upload."""

    def __init__(self):
        self.pushes: list[tuple] = []

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=f"user/{repo_id}")

    def upload_folder(self, *, folder_path, commit_message, path_in_repo=None, revision=None, **kwargs):
        names = {path.name for path in Path(folder_path).iterdir() if not path.name.startswith("checkpoint-")}
        self.pushes.append((commit_message, path_in_repo, revision, names - {TRAINING_FILE}))
        return SimpleNamespace(done=lambda: True, result=lambda: None)


def test_as_sft_trainer_pushes(pair, conversations, config, lora, tmp_path, monkeypatch):
    pushes = []
    for trainer_class in (SFTTrainer, GIFTSFTTrainer):
        hub = Hub()
        monkeypatch.setattr(transformers.trainer, "hf_api", lambda hub=hub: hub)
        args = config(
            output_dir=str(tmp_path / trainer_class.__name__),
            push_to_hub=True,
            hub_strategy="checkpoint",
            hub_revision="try",
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
        )
        tokenizer = AutoTokenizer.from_pretrained(pair[1])
        trainer = trainer_class(
            pair[0], args, train_dataset=conversations, processing_class=tokenizer, peft_config=lora
        )
        trainer.train()
        trainer.save_model()
        trainer.push_to_hub("done", tags="mine", dataset_name="user/data")
        pushes.append(hub.pushes)
    assert len(pushes[0]) == 6 and pushes[0] == pushes[1]
