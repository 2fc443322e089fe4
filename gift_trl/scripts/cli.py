"""`gift-trl`: the front door to the commands."""

import argparse
import gc
import importlib
import os
import sys
import warnings
from collections.abc import Callable

from gift_trl.scripts.launch import end_with_launcher, launch, wants_launch
from gift_trl.scripts.tokens import refuse_tokens


# Listed here, so that `gift-trl --help` imports neither torch nor TRL
COMMANDS = {
    "annotate": "score every target token of a dataset with the instruct model (stage 1)",
    "report": "look at results: models compared with intervals, pictures and examples; or at annotated data",
    "train": "annotate if needed, train the adapter on the base model, merge it if asked (stages 1 to 3)",
    "merge": "add a trained adapter to the instruct model's checkpoint (stage 3)",
    "sweep": "find the scale of the update that is best on validation data, without writing checkpoints",
    "push": "push a merged model or an adapter to the Hub, in one commit that is checked afterwards",
    "evaluate": "let models answer tasks, grade the answers, and keep them all",
    "quickstart": "see the whole method at work on a tiny model pair, in minutes on a CPU",
    "lab": "the effect experiment on tiny pairs: every method over seeds, noise, learning rates and data sizes",
    "recipe": "write a recipe for a pair of models that has none",
    "estimate": "memory and time of a recipe's stages on given GPUs, and the accelerate configuration to take",
    "make-pair": "make a small base/instruct pair with random weights from a text file, to try recipes with",
}
_DEBUG = "GIFT_TRL_DEBUG"
_GO_ON = (
    "What is finished is kept: the same command goes on from there, a training from its last checkpoint with "
    "`--resume_from_checkpoint auto`."
)


class ExampleHelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults shown, the example left as it is laid out."""


def _usage() -> str:
    width = max(len(name) for name in COMMANDS)
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: gift-trl COMMAND [options]\n\n"
        "GIFT (Guided Fine-Tuning and Transfer): adapt an instruction-tuned model to your task. The instruct model\n"
        "scores your data, an adapter is trained on the base model, and is merged into the instruct model.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n"
        "  -h, --help  show this message; `gift-trl COMMAND --help` shows the options of a command\n"
        "  --version   show the version\n"
    )


def run(command: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """
    Runs a command; what the user can mend ends as one message and the exit status 1, an interruption as one and the status
    130, not as a traceback.

    Args:
        command (`Callable`):
            `main` of a command module.
        argv (`list[str]`, *optional*):
            Arguments. Defaults to those of the process.
    """
    end_with_launcher()
    # TRL's own default raises it in every run, and nothing a recipe says can mend it
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        refuse_tokens(sys.argv[1:] if argv is None else argv)
        command(argv)
        _leave_processes()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nInterrupted. {_GO_ON}", file=sys.stderr)
        raise SystemExit(130) from None
    # A library that is wanted and not installed among them
    except (ImportError, OSError, TypeError, ValueError) as error:
        if os.environ.get(_DEBUG):
            raise
        print(f"error: {error}\n(Set {_DEBUG}=1 to see where it was raised.)", file=sys.stderr)
        raise SystemExit(1) from None


def _leave_processes() -> None:
    """Ends the communication of the processes, whose threads may else abort a process that has done its work."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a trainer keeps the group, and with it its threads, to the end of the interpreter
        distributed.destroy_process_group()


def main() -> None:
    """Entry point of `gift-trl`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage(), end="")
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        from gift_trl import __version__

        print(f"gift_trl {__version__}")
        return
    if arguments[0] not in COMMANDS:
        print(f"error: there is no command `{arguments[0]}`.\n\n{_usage()}", end="", file=sys.stderr)
        raise SystemExit(2)
    name = f"gift_trl.scripts.{arguments[0].replace('-', '_')}"
    module = importlib.import_module(name)
    if wants_launch(arguments[0], arguments[1:]):
        run(lambda argv: launch(name, module.make_parser(), argv), arguments[1:])
    else:
        run(module.main, arguments[1:])


if __name__ == "__main__":
    main()
