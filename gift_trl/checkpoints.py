"""Checkpoint folders: where they are, which safetensors files they hold, what identifies them, how one is written."""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub import parse_local_safetensors_file_metadata, snapshot_download
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import SafetensorsFileMetadata
from safetensors import SafetensorError, safe_open

from gift_trl.leftovers import REPLACED, TEMPORARY, clear_leftovers, held, sibling


ADAPTER_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
# What a training says of itself beside the adapter
TRAINING_FILE = "gift_training.json"
# What a merge and its verification write beside the weights, and what the card of a merged model shows
REPORT_FILE, KINSHIP_PLOT_FILE, VERIFICATION_FILE = "merge_report.json", "kinship.png", "merge_verification.json"
SIGNAL_PLOT_FILE, EVALUATION_FILE = "learning_signal.png", "evaluation.json"

# Everything `from_pretrained` may read, and nothing else: some repositories hold every weight three times over.
_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", CARD_FILE]
_DESCRIPTION_FILES += ["LICENSE*", "NOTICE*", "*POLICY*"]
_OTHER_FORMATS = ["original/*", "onnx/*", "openvino/*", "checkpoint-*/*", "consolidated*"]

# A file of at most this many bytes is hashed whole; of a larger one, the middle of every tensor of a layer is.
_WHOLE_FILE_BYTES = 16 * 2**20
_SAMPLE_BYTES = 4096
_BLOCK_BYTES = 2**20
# Names of what is in a layer have its number
_IN_LAYER = re.compile(r"(^|\.)\d+\.")


def checkpoint_folder(model_name_or_path: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """
    Finds the folder of a checkpoint, downloading it from the Hub where it is not a local one.

    Args:
        model_name_or_path (`str`):
            Local folder, taken as it is, or the id of a model repository on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. Ignored for a local folder.
        weights (`bool`, *optional*, defaults to `True`):
            Whether to download the safetensors files too, not only the configuration and tokenizer files. A local
            folder is returned either way.

    Returns:
        `Path`: The folder.

    Raises:
        `FileNotFoundError`: If there is neither such a folder nor such a repository, or the Hub cannot be asked.
    """
    path = Path(model_name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(model_name_or_path)
    if path.exists():
        raise FileNotFoundError(f"'{name}' is a file: pass the folder that holds the checkpoint.")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*_DESCRIPTION_FILES, "*.safetensors"] if weights else _DESCRIPTION_FILES,
                ignore_patterns=_OTHER_FORMATS,
            )
        )
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no folder '{name}', and it cannot be the id of a Hub repository either: check the path."
        ) from error
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"The Hub repository '{name}' is gated: accept its terms on its page, then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"The Hub repository '{name}' has no revision '{revision}': pass one of its branches, tags or commits."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is neither a folder nor a Hub repository '{name}': check the spelling, or run `hf auth login` if "
            "the repository is private."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder '{name}', the Hub cache does not hold it and the Hub cannot be asked: pass an existing "
            "folder, or go online (with `HF_HUB_OFFLINE` unset) to download it."
        ) from error


def read_header(path: str | os.PathLike) -> tuple[SafetensorsFileMetadata, int]:
    """
    Reads the header of a safetensors file and checks that the file is as long as the header says.

    Args:
        path (`str` or `os.PathLike`):
            The file.

    Returns:
        `tuple[SafetensorsFileMetadata, int]`: Names, dtypes, shapes and data offsets of the tensors, and the offset in
        the file at which the data begins.

    Raises:
        `ValueError`: If the file is not a safetensors file, or is truncated or longer than its tensors.
    """
    path = Path(path)
    damaged = f"'{path.name}' in '{path.parent}' is not a readable safetensors file: copy or download it again."
    try:
        header = parse_local_safetensors_file_metadata(path)
        end = max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0)
    except (SafetensorsParsingError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(damaged) from error
    with open(path, "rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if size != data_start + end:
        raise ValueError(
            f"'{path.name}' in '{path.parent}' is {size:,} bytes long, its header says {data_start + end:,}: the file is "
            "damaged or was not copied to its end, copy or download it again."
        )
    try:
        # Checks what the parser above takes on trust: that sizes fit shapes, and that the data has no gaps or overlaps.
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(damaged) from error
    return header, data_start


def safetensors_files(folder: str | os.PathLike) -> list[Path]:
    """
    Lists the safetensors files of a checkpoint or adapter folder, after checking that they are complete.

    Args:
        folder (`str` or `os.PathLike`):
            Folder with `model.safetensors`, with `model.safetensors.index.json` and its shards, or with
            `adapter_model.safetensors`.

    Returns:
        `list[Path]`: The single file, or the shards in the order of their numbers.

    Raises:
        `FileNotFoundError`: If the folder holds no safetensors file, or lacks a shard that its index names.
        `ValueError`: If the index and the shards disagree, or a file is damaged.
    """
    folder = Path(folder)
    index_file = folder / SAFETENSORS_INDEX_FILE
    if not index_file.is_file():
        for name in (SAFETENSORS_SINGLE_FILE, ADAPTER_FILE):
            if (folder / name).is_file():
                read_header(folder / name)
                return [folder / name]
        raise FileNotFoundError(_no_safetensors(folder))
    if (folder / SAFETENSORS_SINGLE_FILE).is_file():
        raise ValueError(
            f"'{folder}' holds both {SAFETENSORS_SINGLE_FILE} and {SAFETENSORS_INDEX_FILE}, two checkpoints in one "
            "folder: move the outdated one away."
        )

    try:
        weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        # The name is used as a path below: an index must not lead out of its folder.
        foreign = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{index_file}' is not a readable weight index: copy or download it again.") from error
    if foreign:
        raise ValueError(f"'{index_file}' names '{foreign[0]}', which is not in the same folder: download it again.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"'{folder}' lacks {len(missing)} of {len(names)} shards named in {SAFETENSORS_INDEX_FILE} (first: "
            f"{missing[0]}): copy or download the checkpoint again."
        )
    strays = sorted(p.name for p in folder.glob("model-*-of-*.safetensors") if p.name not in names)
    if strays:
        raise ValueError(
            f"'{folder}' holds {strays[0]}, which {SAFETENSORS_INDEX_FILE} does not name: shards of two checkpoints are "
            "mixed, remove the strays or download the checkpoint again."
        )
    held = {name: read_header(folder / name)[0].tensors for name in names}
    lost = [(tensor, name) for tensor, name in weight_map.items() if tensor not in held[name]]
    if lost:
        raise ValueError(
            f"{SAFETENSORS_INDEX_FILE} in '{folder}' places {len(lost)} tensors in shards that do not hold them (first: "
            f"{lost[0][0]} in {lost[0][1]}): index and shards come from different checkpoints, download both again."
        )
    return [folder / name for name in names]


def _no_safetensors(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder '{folder}': check the path."
    if any(folder.glob("adapter_model*.bin")):
        return (
            f"'{folder}' holds an adapter as .bin, only safetensors are read: convert it with "
            f"`PeftModel.from_pretrained(base_model, '{folder}').save_pretrained(new_folder)`."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return (
            f"'{folder}' holds weights as .bin or .pth, only safetensors are read: convert them with "
            f"`AutoModelForCausalLM.from_pretrained('{folder}', dtype='auto').save_pretrained(new_folder)`."
        )
    return (
        f"'{folder}' holds no {SAFETENSORS_SINGLE_FILE}, {SAFETENSORS_INDEX_FILE} or {ADAPTER_FILE}: pass the folder "
        "that `save_pretrained` wrote."
    )


def weights_fingerprint(folder: str | os.PathLike) -> str:
    """
    Identifies the weights of a folder by their content, whatever the folder is called and wherever it lies.

    Headers and sizes are hashed whole; so is the data of files up to 16 MiB. Of a larger file, the tensors outside of the
    layers are, since single rows of the vocabulary's matrices may differ, and 4 KiB from the middle of every tensor of a
    layer, which keeps a checkpoint of 100 GB a matter of seconds.

    Args:
        folder (`str` or `os.PathLike`):
            Checkpoint or adapter folder, as in [`safetensors_files`].

    Returns:
        `str`: SHA-256 as 64 hexadecimal digits.

    Raises:
        `FileNotFoundError`, `ValueError`: As [`safetensors_files`].
    """
    digest = hashlib.sha256()
    for path in safetensors_files(folder):
        header, data_start = read_header(path)
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                digest.update(file.read())
                continue
            digest.update(file.read(data_start))
            for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets):
                start, end = tensor.data_offsets
                if _IN_LAYER.search(name):
                    start = max(start, (start + end - _SAMPLE_BYTES) // 2)
                    end = min(end, start + _SAMPLE_BYTES)
                file.seek(data_start + start)
                for position in range(start, end, _BLOCK_BYTES):
                    digest.update(file.read(min(_BLOCK_BYTES, end - position)))
    return digest.hexdigest()


def check_output_folder(
    output_dir: str | os.PathLike,
    *,
    overwrite: bool = False,
    marks: Sequence[str] = (),
    option: str = "`overwrite=True`, `--overwrite`",
) -> Path:
    """
    Checks that a folder may be written, before the work whose result goes there.

    Args:
        output_dir (`str` or `os.PathLike`):
            The folder to be.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether a folder that has something in it may be replaced.
        marks (`Sequence[str]`, *optional*, defaults to `()`):
            Names of files by which a folder that may be replaced is known; it has to hold one of them.
        option (`str`, *optional*, defaults to ``"`overwrite=True`, `--overwrite`"``):
            What the caller's user sets to have the folder replaced.

    Returns:
        `Path`: The folder with links and relative parts resolved.

    Raises:
        `FileExistsError`: If it is a file or a mount point, or holds something and `overwrite` is not set or it has none
            of the `marks`, or replacing it would remove the working directory.
    """
    output_dir = Path(output_dir).expanduser().resolve()
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"'{output_dir}' is a file: choose another output folder.")
    if os.path.ismount(output_dir):
        raise FileExistsError(
            f"'{output_dir}' is a mount point, onto which no finished folder can be renamed: choose a folder inside it."
        )
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"'{output_dir}' exists and is not empty: choose another output folder, or overwrite it ({option})."
            )
        if marks and not any((output_dir / name).is_file() for name in marks):
            raise FileExistsError(
                f"'{output_dir}' does not look like something that was written here before, it holds no "
                f"{' and no '.join(marks)}: it is not overwritten. Choose another output folder, or move what it holds away."
            )
        if Path.cwd().is_relative_to(output_dir):
            raise FileExistsError(
                f"'{output_dir}' holds the working directory and would be removed whole: choose a new output folder."
            )
    return output_dir


@contextmanager
def write_folder(
    output_dir: str | os.PathLike, *, overwrite: bool = False, marks: Sequence[str] = ()
) -> Iterator[Path]:
    """
    Writes a folder whole or not at all.

    The body of the `with` statement fills a temporary folder beside `output_dir`. When it ends well, everything in
    there is flushed to disk and the folder renamed into place; on an error or an interrupt it is removed. What a process
    that was killed meanwhile has left is removed by the next one that writes the same folder.

    Args:
        output_dir (`str` or `os.PathLike`):
            The folder to be. Missing parents are created.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace an `output_dir` that has something in it. The old one stays until the new one is complete.
        marks (`Sequence[str]`, *optional*, defaults to `()`):
            As in [`check_output_folder`].

    Yields:
        `Path`: The temporary folder, empty.

    Raises:
        `FileExistsError`: As [`check_output_folder`].
    """
    clear_leftovers(Path(output_dir).expanduser().resolve())
    output_dir = check_output_folder(output_dir, overwrite=overwrite, marks=marks)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, because a rename is atomic only within a file system.
    token = uuid.uuid4().hex[:12]
    temporary, replaced = (sibling(output_dir, token, kind) for kind in (TEMPORARY, REPLACED))
    temporary.mkdir()
    with ExitStack() as holding:
        holding.enter_context(held(temporary))
        try:
            yield temporary
            _flush(temporary)
            # Looked at again: someone may have written there during a long run.
            check_output_folder(output_dir, overwrite=overwrite, marks=marks)
            if output_dir.exists():
                holding.enter_context(held(output_dir))
                os.rename(output_dir, replaced)
            try:
                os.rename(temporary, output_dir)
            except BaseException:
                if replaced.exists():
                    os.rename(replaced, output_dir)
                raise
            _flush_one(output_dir.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def _flush(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            _flush_one(Path(parent) / name)
        _flush_one(Path(parent))


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
