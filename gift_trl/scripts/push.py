"""`gift-trl push`: a merged model or an adapter, to the Hub."""

import argparse
import sys

from gift_trl.scripts.cli import ExampleHelpFormatter


_DESCRIPTION = """\
Pushes a merged model or an adapter to a model repository on the Hub, in one commit, and then compares names, sizes and
hashes there with the folder. What speaks against it is said before anything is uploaded: the login, the name, files that
would be replaced, an incomplete model, a card that the Hub does not take. Requests are repeated where that helps; after a
failure, the same command sends only what is missing. A merged model that has no card gets one. The token is that of
`hf auth login` or HF_TOKEN, never an option.

Pushed are safetensors, what loading reads beside them, documents, licences and pictures; not pushed are hidden files,
pickles, other formats, and what a trainer keeps of its run. Without --overwrite, files are only added. With it, files are
replaced, and weights and descriptions of an earlier model deleted; documents and pictures stay.
"""
_EPILOG = """\
examples:
  %(prog)s outputs/merged --repo_id USER/NAME --private
  %(prog)s outputs/merged --repo_id USER/NAME --revision step-000100 --tag v1 --commit_message "Merge at step 100"
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser of the command."""
    parser = argparse.ArgumentParser(
        prog=prog or "gift-trl push",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=ExampleHelpFormatter,
        allow_abbrev=False,
    )
    optional = {"default": argparse.SUPPRESS}
    parser.add_argument("folder", metavar="DIR", help="folder of the model with its tokenizer, or of the adapter")
    parser.add_argument(
        "--repo_id", "--repo-id", required=True, metavar="USER/NAME", help="repository, created if it does not exist"
    )
    parser.add_argument(
        "--private", action="store_true", **optional, help="create it as a private one; a public one is refused"
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", **optional, help="branch, created if it does not exist (default: main)"
    )
    parser.add_argument("--tag", metavar="TAG", **optional, help="tag for the commit")
    parser.add_argument(
        "--commit_message", "--commit-message", metavar="TEXT", **optional, help="message of the commit"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what the branch holds of another model")
    parser.add_argument(
        "--max_size_gb",
        "--max-size-gb",
        metavar="GB",
        type=float,
        **optional,
        help="refuse a larger upload (10⁹ bytes)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """
    Runs the command.

    Args:
        argv (`list[str]`, *optional*):
            Arguments; those of the process if not given.

    Raises:
        `ValueError`, `OSError`: As [`~gift_trl.hub.push_folder`].
    """
    options = vars(make_parser().parse_args(argv))

    from gift_trl.hub import push_command, push_folder
    from gift_trl.hub.card import complete_merged_card
    from gift_trl.repositories import check_repository

    if "/" not in options["repo_id"]:  # the card names the model with its namespace
        options["repo_id"], _ = check_repository(options["repo_id"], private=options.get("private"))
    complete_merged_card(options["folder"], options["repo_id"], options.get("revision"))
    try:
        print(push_folder(**options).summary())
    except KeyboardInterrupt:
        options.pop("max_size_gb", None)
        print(f"\nInterrupted. To finish, run `{push_command(**options)}`.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    from gift_trl.scripts.cli import run

    run(main)
