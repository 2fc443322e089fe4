import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import save_file

from gift_trl import checkpoints
from gift_trl.checkpoints import (
    check_output_folder,
    checkpoint_folder,
    read_header,
    safetensors_files,
    weights_fingerprint,
    write_folder,
)
from gift_trl.plots import new_figure


def make_single(folder, seed=0, rows=16):
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    save_file({"a": torch.randn(rows, 8), "b": torch.randn(rows)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_sharded(folder):
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        save_file({f"{'cba'[i]}.weight": torch.full((4,), float(i))}, folder / name)
    index = {"metadata": {}, "weight_map": {"a.weight": names[2], "b.weight": names[1], "c.weight": names[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_checkpoint_folder_takes_a_local_folder_as_it_is(tmp_path, monkeypatch):
    assert checkpoint_folder(str(tmp_path), revision="any") == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert checkpoint_folder(f"~/{tmp_path.name}") == tmp_path


def test_checkpoint_folder_downloads_no_other_formats(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda name, **kwargs: asked.update(kwargs) or str(tmp_path))
    assert checkpoint_folder("org/model", "v1") == tmp_path
    assert asked["revision"] == "v1"
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not any("bin" in pattern or "gguf" in pattern for pattern in asked["allow_patterns"])
    checkpoint_folder("org/model", weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (HFValidationError, "cannot be the id of a Hub repository either: check the path"),
        (GatedRepoError, "is gated: accept its terms"),
        (RevisionNotFoundError, "has no revision 'v1': pass one of its branches"),
        (RepositoryNotFoundError, "neither a folder nor a Hub repository.*check the spelling"),
    ],
)
def test_checkpoint_folder_errors(monkeypatch, error, match):
    def fail(*args, **kwargs):
        raise error.__new__(error)  # their constructors ask for the Hub's response

    monkeypatch.setattr(checkpoints, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=match):
        checkpoint_folder("org/model", "v1")


def test_checkpoint_folder_offline_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="the Hub cannot be asked: pass an existing folder"):
        checkpoint_folder("org/no-such-model")
    with pytest.raises(FileNotFoundError, match="check the path"):
        checkpoint_folder(str(tmp_path / "no" / "such" / "folder"))
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file: pass the folder"):
        checkpoint_folder(str(tmp_path / "file"))


def test_safetensors_files_of_each_layout(tmp_path):
    assert [f.name for f in safetensors_files(make_single(tmp_path / "single"))] == ["model.safetensors"]
    names = [f.name for f in safetensors_files(make_sharded(tmp_path / "sharded"))]
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "single" / "adapter_model.safetensors")
    assert [f.name for f in safetensors_files(tmp_path / "single")] == ["adapter_model.safetensors"]
    # Another format of the same weights is none of the shards.
    (tmp_path / "sharded" / "consolidated.safetensors").write_bytes(b"x")
    assert len(safetensors_files(tmp_path / "sharded")) == 3


def test_folders_without_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        safetensors_files(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors"):
        safetensors_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"convert them with `AutoModelForCausalLM.from_pretrained\("):
        safetensors_files(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"convert it with `PeftModel.from_pretrained\("):
        safetensors_files(tmp_path)


def test_index_and_shards_that_disagree(tmp_path):
    folder = make_sharded(tmp_path)
    index_file, shard = folder / "model.safetensors.index.json", folder / "model-00002-of-00003.safetensors"
    index = json.loads(index_file.read_text())

    shard.rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 3 shards .*first: model-00002-of-00003.safetensors"):
        safetensors_files(folder)
    (tmp_path / "kept").rename(shard)

    save_file({"d": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"holds model-00001-of-00002.safetensors, which .* does not name"):
        safetensors_files(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()

    index["weight_map"]["z.weight"] = shard.name
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"places 1 tensors in shards that do not hold them .first: z.weight"):
        safetensors_files(folder)

    index["weight_map"]["z.weight"] = "../elsewhere.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not in the same folder"):
        safetensors_files(folder)

    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        index_file.write_text(text)
        with pytest.raises(ValueError, match="not a readable weight index"):
            safetensors_files(folder)

    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="two checkpoints in one folder"):
        safetensors_files(folder)


@pytest.mark.parametrize("damage", ["short", "long", "no header", "offsets", "half an offset", "shape", "empty"])
def test_damaged_files(tmp_path, damage):
    file = make_single(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    read_header(file)
    damaged = {
        "short": content[:-1],
        "long": content + b"x",
        "no header": b"\xff" * len(content),
        "offsets": content.replace(b"[0,512]", b"[8,512]").replace(b"[64,576]", b"[65,576]"),
        "half an offset": content.replace(b"[0,512]", b"[      0]"[:7]),
        "shape": content.replace(b"[16,8]", b"[16,9]"),
        "empty": b"",
    }[damage]
    assert damaged != content
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="copy or download it again"):
        safetensors_files(tmp_path)


def test_fingerprint_follows_the_content_not_the_place(tmp_path, monkeypatch):
    first = weights_fingerprint(make_single(tmp_path / "a"))
    assert len(first) == 64
    (tmp_path / "a").rename(tmp_path / "b")
    assert weights_fingerprint(tmp_path / "b") == first
    assert weights_fingerprint(make_single(tmp_path / "other", seed=1)) != first
    assert weights_fingerprint(make_sharded(tmp_path / "sharded")) != first

    # A larger file is sampled
    monkeypatch.setattr(checkpoints, "_WHOLE_FILE_BYTES", 0)
    big = weights_fingerprint(make_single(tmp_path / "big", rows=4096))
    assert weights_fingerprint(make_single(tmp_path / "big", rows=4096)) == big
    file = tmp_path / "big" / "model.safetensors"
    content = bytearray(file.read_bytes())
    start, end = read_header(file)[0].tensors["a"].data_offsets
    content[read_header(file)[1] + (start + end) // 2] ^= 1
    file.write_bytes(content)
    assert weights_fingerprint(tmp_path / "big") != big


def test_fingerprint_sees_every_row_of_the_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_WHOLE_FILE_BYTES", 0)
    monkeypatch.setattr(checkpoints, "_BLOCK_BYTES", 1000)
    layers = {"model.layers.0.mlp.up_proj.weight": (96, 64), "model.layers.10.experts.down_proj": (2, 80, 64)}
    outside = {"model.embed_tokens.weight": (384, 32), "lm_head.weight": (383, 32), "model.norm.weight": (32,)}
    tensors = {name: torch.zeros(shape) for name, shape in {**layers, **outside}.items()}

    def fingerprint():
        save_file(tensors, tmp_path / "model.safetensors")
        return weights_fingerprint(tmp_path)

    found = {fingerprint()}
    places = [(name, place) for name in outside for place in (0, len(tensors[name]) // 3, -1)]
    places += [(name, len(tensors[name]) // 2) for name in layers]
    for name, place in places:
        tensors[name][place] += 1
        found.add(fingerprint())
    assert len(found) == 1 + len(places)


def test_write_folder_appears_whole(tmp_path, monkeypatch):
    output = tmp_path / "deep" / "er" / "output"
    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
    with write_folder(output) as folder:
        assert folder.parent == output.parent and not any(folder.iterdir())
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("text")
        assert not output.exists()
    assert (output / "sub" / "file").read_text() == "text"
    assert [path.name for path in output.parent.iterdir()] == ["output"]
    assert [path.rsplit("/", 1)[-1] for path in flushed if path.endswith("file")] == ["file"]
    assert str(output.parent) in flushed
    reference = tmp_path / "reference"
    reference.mkdir()
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_write_folder_leaves_nothing_after_an_error(tmp_path, error):
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").touch()
    with pytest.raises(error), write_folder(output, overwrite=True) as folder:
        (folder / "new").touch()
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert [path.name for path in output.iterdir()] == ["old"]


def test_write_folder_replaces_only_when_told(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    with write_folder(output) as folder:  # an empty folder is as good as none
        (folder / "old").touch()
    with pytest.raises(FileExistsError, match="not empty: choose another output folder, or overwrite"):
        with write_folder(output):
            pass
    with write_folder(output, overwrite=True) as folder:
        (folder / "new").touch()
        assert (output / "old").exists()
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_write_folder_refuses_what_was_filled_meanwhile(tmp_path):
    with pytest.raises(FileExistsError, match="not empty"), write_folder(tmp_path / "output"):
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "of another run").touch()
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["of another run"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_write_folder_puts_the_old_one_back(tmp_path, monkeypatch):
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").touch()
    real = os.rename

    def rename(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("disk gone")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="disk gone"), write_folder(output, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert [path.name for path in output.iterdir()] == ["old"]


def write_and_die(output: Path, moment: str) -> None:
    """Begins to replace a folder in another process, which is killed before it ends."""
    code = """
import os, signal, sys
from gift_trl.checkpoints import write_folder
output, moment = sys.argv[1:]
rename = os.rename
def rename_once(source, target):
    rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "between the renames":
    os.rename = rename_once
with write_folder(output, overwrite=True) as folder:
    (folder / "new").touch()
    if moment == "while writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, output, moment]).returncode == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["while writing", "between the renames"])
def test_write_folder_clears_up_after_a_killed_process(tmp_path, moment):
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").touch()
    (tmp_path / ".output.note.tmp").mkdir()  # somebody else's
    write_and_die(output, moment)
    assert len(list(tmp_path.iterdir())) > 2
    with pytest.raises(FileExistsError, match="not empty"), write_folder(output):
        pass
    assert [path.name for path in output.iterdir()] == ["old"], "nothing that was there is lost"
    with write_folder(output, overwrite=True) as folder:
        (folder / "newer").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".output.note.tmp", "output"]
    assert [path.name for path in output.iterdir()] == ["newer"]


def test_write_folder_leaves_alone_what_another_process_writes(tmp_path):
    with write_folder(tmp_path / "output", overwrite=True) as first:
        (first / "first").touch()
        with write_folder(tmp_path / "output", overwrite=True) as second:
            (second / "second").touch()
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "picture.png").write_bytes(b"the one before")

    def write_half(self, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", write_half)
    with pytest.raises(OSError, match="disk full"), new_figure(tmp_path / "picture.png", (1, 1)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert (tmp_path / "picture.png").read_bytes() == b"the one before"
    monkeypatch.undo()
    with new_figure(tmp_path / "picture.png", (1, 1)):
        pass
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_check_output_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file: choose another"):
        check_output_folder(tmp_path / "file", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="holds the working directory"):
        check_output_folder(".", overwrite=True)
    assert check_output_folder("new") == tmp_path / "new"


def test_check_output_folder_knows_what_it_may_replace(tmp_path):
    (tmp_path / "file").touch()
    assert check_output_folder(tmp_path, overwrite=True) == tmp_path
    match = "holds no config.json and no report.json: it is not overwritten. Choose another output folder"
    with pytest.raises(FileExistsError, match=match):
        check_output_folder(tmp_path, overwrite=True, marks=("config.json", "report.json"))
    with (
        pytest.raises(FileExistsError, match="is not overwritten"),
        write_folder(tmp_path, overwrite=True, marks=["a"]),
    ):
        pass
    (tmp_path / "report.json").touch()
    check_output_folder(tmp_path, overwrite=True, marks=("config.json", "report.json"))
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty", marks=("config.json",))


def test_check_output_folder_refuses_mount_points():
    with pytest.raises(FileExistsError, match=r"'/proc' is a mount point.*choose a folder inside it"):
        check_output_folder("/proc", overwrite=True)
