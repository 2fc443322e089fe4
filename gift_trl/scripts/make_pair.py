"""`gift-trl make-pair`: a small base and instruct model with random weights, to try a recipe on one's own data."""

import argparse
import json
from pathlib import Path

from gift_trl.scripts.cli import ExampleHelpFormatter


_DESCRIPTION = """\
Trains a byte-level BPE tokenizer on a JSON-lines file and saves a small Llama with random weights, twice: as
OUTPUT_DIR/base, and a small random step away as OUTPUT_DIR/instruct. Both load like any pair of a base and an instruct
model, with a ChatML template, and know nothing: they are for trying a recipe without downloading a model.
"""
_EPILOG = """\
example:
  gift-trl make-pair --dataset data.jsonl --output_dir outputs/numina_pair --vocab_size 1024
  gift-trl train --config recipes/quickstart/numina.yaml --dataset data.jsonl
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog or "gift-trl make-pair",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=ExampleHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, help="JSON-lines file", default=argparse.SUPPRESS)
    parser.add_argument(
        "--output_dir", required=True, help="folder for the two checkpoints", default=argparse.SUPPRESS
    )
    parser.add_argument(
        "--text_columns", nargs="+", default=["instruction", "response"], help="columns that hold the text"
    )
    parser.add_argument("--vocab_size", type=int, default=4096, help="largest size of the vocabulary")
    parser.add_argument("--hidden_size", type=int, default=128, help="hidden size of the models")
    parser.add_argument("--num_layers", type=int, default=2, help="number of layers")
    parser.add_argument("--num_heads", type=int, default=4, help="number of attention heads")
    parser.add_argument("--max_length", type=int, default=4096, help="longest input of the models")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an output_dir that holds such a pair")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    options = make_parser().parse_args(argv)
    texts = _read_texts(Path(options.dataset), options.text_columns)

    import transformers

    from gift_trl.lab.text_pair import make_text_pair

    transformers.utils.logging.disable_progress_bar()

    base, instruct = make_text_pair(
        texts,
        options.output_dir,
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        max_length=options.max_length,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    print(f"Base model: {base}\nInstruct model: {instruct}")


def _read_texts(path: Path, columns: list[str]) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: give --dataset a JSON-lines file.")
    texts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"Line {number} of {path} is no JSON ({error.msg}): --dataset needs one JSON object per line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"Line {number} of {path} is no JSON object: --dataset needs one per line.")
            for column in columns:
                if not isinstance(row.get(column), str):
                    raise ValueError(
                        f"Line {number} of {path} has no text in the column `{column}`; its columns are "
                        f"{', '.join(row)}: name columns of text with --text_columns."
                    )
                texts.append(row[column])
    return texts


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
