"""
Merges a LoRA adapter into a generated checkpoint in four ways, and measures CPU seconds, memory and bits.

    python benchmarks/merge.py --mergekit-python ENVIRONMENT/bin/python
    python benchmarks/merge.py --adapter-types all
    python benchmarks/merge.py --methods gift_trl before cp --before OTHER_CHECKOUT
    python benchmarks/merge.py --kernels

- **peft**: the usual script: load the model, `PeftModel.from_pretrained`, `merge_and_unload`, `save_pretrained`.
- **mergekit**: `mergekit-yaml` with `model: INSTRUCT+ADAPTER`, in an environment of its own.
- **gift_trl**: `merge_adapter`.
- **before**: `merge_adapter` of another checkout of this repository (`--before`).
- **cp**: `cp -r` of the checkpoint: what has to be read and written at least.

Each run is a process of its own; rounds are interleaved, and medians taken. CPU seconds are user and system time of the
process and its children, less those of a process that only imports what the method imports. Memory is the peak of anonymous
memory above the imports. All results are compared tensor by tensor, to the last bit.

With `--adapter-types`, other types of adapter take LoRA's place: each is merged by gift_trl and by PEFT into two layers of
the same shapes, where the peak of gift_trl is that of the whole model. With `--kernels`, the ways to add a product to a block
of rows are timed, in this process.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


PRESETS: dict[str, dict[str, Any]] = {
    # The shape of Qwen2.5-1.5B, whose weights take 3.1 GB in bfloat16
    "1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# PEFT's own defaults, but for a rank of LoRA that is in use, and for what has no default
ADAPTER_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 64, "lora_alpha": 128}),
    "dora": ("LoraConfig", {"r": 64, "lora_alpha": 128, "use_dora": True}),
    "loha": ("LoHaConfig", {}),
    "lokr": ("LoKrConfig", {}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "hira": ("HiraConfig", {}),
    "miss": ("MissConfig", {}),
    "peanut": ("PeanutConfig", {}),
    "delora": ("DeloraConfig", {}),
    "gralora": ("GraloraConfig", {}),
    "fourierft": ("FourierFTConfig", {}),
    "waveft": ("WaveFTConfig", {}),
    "c3a": ("C3AConfig", {}),
    "oft": ("OFTConfig", {}),
    "hra": ("HRAConfig", {}),
    "boft": ("BOFTConfig", {}),
}

# The code of the model is imported late, but imported all the same
_MODEL = "; from transformers import AutoModelForCausalLM, Qwen2ForCausalLM"
_IMPORTS = {
    "peft": f"import torch; from peft import PeftModel{_MODEL}",
    "gift_trl": f"from gift_trl.merging import merge_adapter{_MODEL}",
    "gift_trl dora": f"from gift_trl.merging import merge_adapter{_MODEL}",
    "before": f"from gift_trl.merging import merge_adapter{_MODEL}",
    "mergekit": f"from mergekit.scripts.run_yaml import main{_MODEL}",
    "cp": "",
}
_MERGES = {
    "peft": """
        model = AutoModelForCausalLM.from_pretrained({instruct!r}, dtype="auto")
        PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload().save_pretrained({output!r})
    """,
    "gift_trl": "merge_adapter({adapter!r}, {instruct!r}, {output!r})",
    "before": "merge_adapter({adapter!r}, {instruct!r}, {output!r})",
    "gift_trl dora": "merge_adapter({adapter!r} + '-dora', {instruct!r}, {output!r})",
    "mergekit": """
        import sys
        sys.argv = ["mergekit-yaml", {recipe!r}, {output!r}, "--lora-merge-cache", {cache!r}]
        main()
    """,
    "cp": "import subprocess; subprocess.run(['cp', '-r', {instruct!r}, {output!r}], check=True)",
}


def make_checkpoint(folder: Path, preset: str, **sizes: Any) -> None:
    """Saves a sharded checkpoint with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**{**PRESETS[preset], **sizes}), dtype=torch.bfloat16)
    model.save_pretrained(folder / "instruct", max_shard_size="500MB" if preset != "tiny" else "50KB")
    _make_tokenizer(PreTrainedTokenizerFast).save_pretrained(folder / "instruct")


def make_adapter(folder: Path, name: str, kind: str, **settings: Any) -> None:
    """Saves an adapter with random values for the checkpoint."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "instruct", dtype="auto")
    config_class, defaults = ADAPTER_TYPES[kind]
    config = getattr(peft, config_class)(
        **{"target_modules": MODULES, "task_type": "CAUSAL_LM", **defaults, **settings},
        base_model_name_or_path=str(folder / "instruct"),
    )
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    adapted.save_pretrained(folder / name)


def make_inputs(folder: Path, preset: str, rank: int) -> None:
    """Saves a sharded checkpoint, a LoRA and a DoRA adapter, and mergekit's recipe."""
    make_checkpoint(folder, preset)
    make_adapter(folder, "adapter", "lora", r=rank, lora_alpha=2 * rank)
    make_adapter(folder, "adapter-dora", "dora", r=rank, lora_alpha=2 * rank)
    recipe = {"merge_method": "passthrough", "dtype": "bfloat16"}
    recipe["models"] = [{"model": f"{folder / 'instruct'}+{folder / 'adapter'}"}]
    (folder / "mergekit.yaml").write_text(json.dumps(recipe))


def _make_tokenizer(tokenizer_class: type) -> Any:
    # mergekit copies a tokenizer, so there has to be one
    from tokenizers import Tokenizer, models

    return tokenizer_class(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])), eos_token="b")


class _Watch(threading.Thread):
    """Highest anonymous memory of a process while it runs."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status, self.peak = Path(f"/proc/{pid}/status"), 0

    def run(self) -> None:
        while True:
            try:
                text = self.status.read_text()
            except OSError:  # it is gone
                return
            # Not said while the process becomes another program, nor when it has ended and is not yet gone
            if "RssAnon:" in text:
                self.peak = max(self.peak, int(text.split("RssAnon:")[1].split()[0]))
            time.sleep(0.002)


def run(python: str, code: str, threads: int, checkout: str | Path | None = None) -> dict[str, float]:
    """
    Runs code in a process of its own.

    Args:
        python (`str`):
            Interpreter.
        code (`str`):
            Code.
        threads (`int`):
            CPU threads it may use.
        checkout (`str` or `Path`, *optional*):
            Where `gift_trl` is imported from. Defaults to this repository.

    Returns:
        `dict[str, float]`: CPU and wall seconds, and the peak of anonymous memory in MB.
    """
    # What `gift_trl` is imported from here, other environments need not have
    path = str(checkout or Path(__file__).parents[1]) if python == sys.executable else ""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    environment["PYTHONSAFEPATH"] = "1"  # or the folder it runs in would come before
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen([python, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    watch = _Watch(process.pid)
    watch.start()
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(output.decode(errors="replace")[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    watch.join()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": time.monotonic() - started, "peak_mb": watch.peak / 1024}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the dtype, shape and values of every tensor."""
    import torch
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
                found[name] = digest.hexdigest()
    return found


def compare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures every method, and compares what they wrote."""
    places = {"instruct": str(folder / "instruct"), "adapter": str(folder / "adapter"), "cache": str(folder / "cache")}
    places["recipe"] = str(folder / "mergekit.yaml")
    pythons = {"peft": sys.executable, "gift_trl": sys.executable, "cp": sys.executable}
    if args.mergekit_python:
        pythons["mergekit"] = args.mergekit_python
    pythons["gift_trl dora"] = sys.executable
    if args.before:
        pythons["before"] = sys.executable
    if args.methods:
        pythons = {name: pythons[name] for name in args.methods}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    imports: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    written: dict[str, dict[str, str]] = {}
    for number in range(args.rounds):
        for name, python in pythons.items():
            output = folder / f"out-{name.replace(' ', '-')}"
            code = textwrap.dedent(_MERGES[name]).format(**places, output=str(output))
            checkout = args.before if name == "before" else None
            imports[name].append(run(python, _IMPORTS[name] or "pass", args.threads, checkout))
            runs[name].append(run(python, f"{_IMPORTS[name]}\n{code}", args.threads, checkout))
            if number == 0 and name not in ("cp", "gift_trl dora"):
                written[name] = digests(output)
            shutil.rmtree(output)
            shutil.rmtree(folder / "cache", ignore_errors=True)
    methods = {}
    for name in pythons:
        middle = {key: statistics.median(r[key] for r in runs[name]) for key in ("cpu", "wall", "peak_mb")}
        idle = {key: statistics.median(r[key] for r in imports[name]) for key in ("cpu", "wall", "peak_mb")}
        methods[name] = {
            "cpu_s": middle["cpu"] - idle["cpu"],
            "wall_s": middle["wall"] - idle["wall"],
            "peak_mb_above_import": middle["peak_mb"] - idle["peak_mb"],
            "rounds": runs[name],
            "import_rounds": imports[name],
        }
        if name in written and "gift_trl" in written and name != "gift_trl":
            other, ours = written[name], written["gift_trl"]
            # Saved anew, a tied output layer may be written once more
            methods[name]["tensors_equal_to_gift_trl"] = sum(other.get(key) == value for key, value in ours.items())
            methods[name]["tensors"] = len(ours)
    return methods


def compare_types(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peak memory of merging other types of adapter, and whether PEFT merges them to the same bits."""
    _run_here(args, f"merge.make_checkpoint(Path({str(folder)!r}), {args.preset!r}, num_hidden_layers=2)")
    idle = {name: run(sys.executable, _IMPORTS[name], args.threads) for name in ("gift_trl", "peft")}
    types = {}
    for kind in args.adapter_types:
        _run_here(args, f"merge.make_adapter(Path({str(folder)!r}), {kind!r}, {kind!r})")
        found, written = {}, {}
        for name in idle:
            places = {
                "instruct": str(folder / "instruct"),
                "adapter": str(folder / kind),
                "output": str(folder / "out"),
            }
            code = f"{_IMPORTS[name]}\n{textwrap.dedent(_MERGES[name]).format(**places)}"
            measured = run(sys.executable, code, args.threads)
            found[name] = {key: value - idle[name][key] for key, value in measured.items()}
            written[name] = digests(folder / "out")
            shutil.rmtree(folder / "out")
        shutil.rmtree(folder / kind)
        types[kind] = {
            "peak_mb_above_import": found["gift_trl"]["peak_mb"],
            "cpu_s": found["gift_trl"]["cpu"],
            "cpu_s_peft": found["peft"]["cpu"],
            "tensors_equal_to_peft": sum(written["peft"].get(k) == value for k, value in written["gift_trl"].items()),
            "tensors": len(written["gift_trl"]),
        }
    return types


def time_kernels(args: argparse.Namespace) -> str:
    """Markdown table: microseconds of each way to add a product to a block of rows, and whether it has the bits of the first."""
    import torch

    from gift_trl.merging import products

    torch.set_num_threads(args.threads)
    lines = ["| rows × columns | addition | µs | same bits | taken |", "| --- | --- | --- | --- | --- |"]
    for columns in sorted({PRESETS[args.preset][key] for key in ("hidden_size", "intermediate_size")}):
        rows = max(16, 2**18 // columns)
        before, wide = torch.randn(rows, columns).bfloat16(), torch.empty(rows, columns)
        b, a = torch.randn(rows, args.rank), torch.randn(args.rank, columns)
        expected = products.ADDITIONS[0](before, b, a, wide).clone()
        taken = products.quickest_addition(rows, args.rank, columns, args.threads)
        for add in products.ADDITIONS:
            equal = torch.equal(add(before, b, a, wide), expected)
            seconds = min(products.seconds_of(add, before, b, a, wide) for _ in range(100))
            words = f"{rows} × {columns:,} | {add.__name__.strip('_').replace('_', ' ')} | {1e6 * seconds:.0f}"
            lines.append(f"| {words} | {'yes' if equal else 'no'} | {'yes' if add is taken else ''} |")
    return "\n".join(lines)


def _run_here(args: argparse.Namespace, code: str) -> None:
    # In a process of its own, which gives its memory back
    folder = str(Path(__file__).parent)
    run(
        sys.executable,
        f"import sys; sys.path.insert(0, {folder!r}); import merge; from pathlib import Path; {code}",
        args.threads,
    )


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on, without names of hosts or folders."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    libraries = ("torch", "transformers", "peft", "safetensors")
    facts = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": args.threads,
        **{name: version(name) for name in libraries},
    }
    if args.mergekit_python:
        code = "from importlib.metadata import version; print(version('mergekit'))"
        facts["mergekit"] = subprocess.check_output([args.mergekit_python, "-c", code], text=True).strip()
    return facts


def table(result: dict[str, Any]) -> str:
    """Markdown table of a result."""
    ours, lines = (
        result["methods"]["gift_trl"],
        ["| method | CPU s | against gift_trl | peak MB above import | same bits |"],
    )
    lines.append("| --- | --- | --- | --- | --- |")
    for name, method in result["methods"].items():
        equal = f"{method['tensors_equal_to_gift_trl']} of {method['tensors']}" if "tensors" in method else ""
        ratio = method["cpu_s"] / ours["cpu_s"]
        peak = method["peak_mb_above_import"]
        lines.append(f"| {name} | {method['cpu_s']:.2f} | {ratio:.2f}× | {peak:,.0f} | {equal} |")
    return "\n".join(lines)


def table_of_types(result: dict[str, Any]) -> str:
    """Markdown table of a result of `--adapter-types`."""
    bound = result["bound_mb"]
    lines = [
        f"| type | peak MB above import | of the bound of {bound:.0f} MB | same bits as PEFT |",
        "| --- | --- | --- | --- |",
    ]
    for kind, found in result["types"].items():
        peak = found["peak_mb_above_import"]
        equal = f"{found['tensors_equal_to_peft']} of {found['tensors']}"
        lines.append(f"| {kind} | {peak:,.0f} | {peak / bound:.2f}× | {equal} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="1.5b", help="Shape of the model.")
    parser.add_argument("--rank", type=int, default=64, help="Rank of the adapter.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds, each of which runs every method once.")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads.")
    parser.add_argument("--mergekit-python", help="Interpreter of an environment with mergekit; left out without.")
    parser.add_argument("--before", help="Another checkout of this repository, whose merge is measured as `before`.")
    parser.add_argument("--methods", nargs="+", choices=_MERGES, help="Only these methods, gift_trl among them.")
    parser.add_argument("--work-dir", help="Where to make the checkpoints: about five times the size of one.")
    parser.add_argument(
        "--adapter-types",
        nargs="+",
        choices=[*ADAPTER_TYPES, "all"],
        help="Measure the memory of merging these types of adapter, in place of the comparison of methods.",
    )
    parser.add_argument("--kernels", action="store_true", help="Time the ways to add a product, and nothing else.")
    parser.add_argument("--output", help="Result file; default: results/merge-cpu.json or results/merge-memory.json.")
    args = parser.parse_args(arguments)
    if args.kernels:
        print(time_kernels(args))
        return
    needed = {"before": args.before, "mergekit": args.mergekit_python}
    if missing := [name for name in args.methods or () if name in needed and not needed[name]]:
        parser.error(f"{' and '.join(missing)}: name the checkout (--before) or the interpreter (--mergekit-python)")
    if args.methods and "gift_trl" not in args.methods:
        parser.error("--methods: gift_trl has to be among them, the others are compared with it")
    if args.adapter_types and "all" in args.adapter_types:
        args.adapter_types = list(ADAPTER_TYPES)
    with tempfile.TemporaryDirectory(prefix="merge_benchmark_", dir=args.work_dir) as name:
        folder = Path(name)
        result = {"preset": args.preset, "modules": MODULES, "machine": machine(args)}
        if args.adapter_types:
            sizes = PRESETS[args.preset]
            # 4 × the largest targeted tensor, in bfloat16
            result["bound_mb"] = 4 * 2 * sizes["hidden_size"] * sizes["intermediate_size"] / 2**20
            result["types"] = compare_types(args, folder)
        else:
            _run_here(args, f"merge.make_inputs(Path({name!r}), {args.preset!r}, {args.rank})")
            result["bytes"] = sum(file.stat().st_size for file in (folder / "instruct").glob("*.safetensors"))
            result |= {"rank": args.rank, "methods": compare(args, folder)}
    file = "merge-memory.json" if args.adapter_types else "merge-cpu.json"
    output = Path(args.output or Path(__file__).parent / "results" / file)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(table_of_types(result) if args.adapter_types else table(result))


if __name__ == "__main__":
    main()
