"""The arguments of a recipe: one YAML serves `gift-trl annotate` and `gift-trl train`."""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from gift_trl.data_files import read_yaml
from gift_trl.scripts.recipes import recipes_folder
from gift_trl.training.config import GIFTConfig


@dataclass
class GIFTScriptArguments(ScriptArguments):
    """
    Arguments that say what is trained on, beside [`~trl.ScriptArguments`].

    Args:
        dataset_name (`str`, *optional*):
            Hub id of a dataset, a local JSON, JSON-lines, CSV or Parquet file, or a folder written by
            `gift-trl annotate` or `save_to_disk`. `--dataset` on the command line is the same.
        prompt_column (`str`, *optional*):
            Column with the user's question, for data that is not in one of TRL's formats yet. Together with
            `completion_column`, each row becomes a conversation in the instruct model's chat format.
        prompt_template (`str`, *optional*):
            The question as a text in which `{COLUMN}` is filled in, in place of `prompt_column`; `{{` and `}}` stand for
            braces.
        completion_column (`str`, *optional*):
            Column with the reference answer.
        completion_template (`str`, *optional*):
            The answer as such a text, in place of `completion_column`.
        completion_choices (`list[str]`, *optional*):
            Texts that the numbers 0, 1, 2, ... in `completion_column` stand for, such as the letters of choices. With it,
            `completion_template` may be set too, and fills in that text for the column.
        skip_empty_rows (`bool`, *optional*, defaults to `False`):
            Whether to leave out rows that have no text in one of these columns, and say how many. Without it, the first
            one is an error.
        system_prompt (`str`, *optional*):
            System message before every question.
        prompt_suffix (`str`, *optional*):
            Text put after every question.
        chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Variables of the chat template, such as `{"enable_thinking": false}`. What the model is evaluated with should
            be the same.
        max_samples (`int`, *optional*):
            Number of training rows to use.
        sample_seed (`int`, *optional*):
            Seed with which they are drawn. Without it, they are the first ones.
        global_batch_size (`int`, *optional*):
            Rows of an optimizer step over all processes. Sets `gradient_accumulation_steps` to what is left of it after
            processes and `per_device_train_batch_size`, so that a recipe has the same batch on any number of GPUs.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id of a dataset, a local JSON, JSON-lines, CSV or Parquet file, or a folder written by "
            "`gift-trl annotate` or `save_to_disk`.",
            "aliases": ["--dataset"],
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column with the user's question, for data that is not in one of TRL's formats yet."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "The question as a text in which {COLUMN} is filled in, in place of prompt_column."},
    )
    completion_column: str | None = field(default=None, metadata={"help": "Column with the reference answer."})
    completion_template: str | None = field(
        default=None,
        metadata={"help": "The answer as a text in which {COLUMN} is filled in, in place of completion_column."},
    )
    completion_choices: list[str] | None = field(
        default=None,
        metadata={"help": "Texts that the numbers 0, 1, 2, ... in completion_column stand for, such as A B C D."},
    )
    skip_empty_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows without text in one of these columns, and say how many."},
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message before every question."})
    prompt_suffix: str | None = field(default=None, metadata={"help": "Text put after every question."})
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Variables of the chat template, such as '{\"enable_thinking\": false}'."},
    )
    max_samples: int | None = field(default=None, metadata={"help": "Number of training rows to use."})
    sample_seed: int | None = field(
        default=None, metadata={"help": "Seed with which max_samples rows are drawn. They are the first ones without."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of an optimizer step over all processes: sets gradient_accumulation_steps, so that a recipe has "
            "the same batch on any number of GPUs."
        },
    )

    def __post_init__(self):
        for name in ("prompt", "completion"):
            combined = name == "completion" and self.completion_choices is not None
            if getattr(self, f"{name}_column") and getattr(self, f"{name}_template") and not combined:
                raise ValueError(f"`{name}_column` and `{name}_template` both say what the {name} is. Keep one.")
        has_prompt, has_completion = (
            bool(getattr(self, f"{name}_column") or getattr(self, f"{name}_template"))
            for name in ("prompt", "completion")
        )
        if has_prompt != has_completion:
            raise ValueError(
                "`prompt_column` and `completion_column` (or the templates of the same names) belong together: set both, "
                "or neither for data that already has `messages`, `prompt` and `completion`, or `text`."
            )
        if not has_prompt and (self.system_prompt or self.prompt_suffix or self.skip_empty_rows):
            raise ValueError(
                "`system_prompt` and `prompt_suffix` are added to the question in `prompt_column`, and `skip_empty_rows` "
                "looks there for one, but it is not set. Set `prompt_column` and `completion_column`, or put the text into "
                "the data."
            )
        if self.completion_choices is not None and self.completion_column is None:
            raise ValueError("`completion_choices` says what numbers in `completion_column` mean, which is not set.")
        if (
            self.completion_choices
            and self.completion_template
            and f"{{{self.completion_column}}}" not in self.completion_template
        ):
            raise ValueError(
                f"`completion_choices` says what numbers in `{self.completion_column}` mean, and `completion_template` does not "
                f"name that column: write `{{{self.completion_column}}}` in it, or unset `completion_choices`."
            )
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = _parse_mapping("chat_template_kwargs", self.chat_template_kwargs)
        for name in ("max_samples", "global_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}; it must be at least 1.")
        if self.sample_seed is not None and self.max_samples is None:
            raise ValueError("`sample_seed` draws `max_samples` rows, which is not set.")


def _parse_mapping(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is {text!r}, which is no JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f'`{name}` is {text!r}; write a JSON object, such as {{"name": 1}}.')
    return value


@dataclass
class MergeArguments:
    """
    Arguments of the merge after training, and of the push of the merged model: those of [`MergeAndPushCallback`].

    Args:
        merge_output_dir (`str`, *optional*):
            Folder for the merged model. Without it, training ends with the adapter.
        merge_scale (`float`, *optional*, defaults to `1.0`):
            Coefficient λ of the adapter in the merge θ_I + λ·M(φ).
        merge_overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a `merge_output_dir` that is not empty, once the new model is complete.
        merge_saved_modules (`str`, *optional*):
            What to do with modules that were trained whole (`lora_modules_to_save`): `"replace"` the instruct model's by
            them, unscaled, or `"ignore"` them. Without a choice, a recipe that trains any is refused.
        merge_at_every_checkpoint (`bool`, *optional*, defaults to `False`):
            Whether to merge every checkpoint too, into folders beside `merge_output_dir` that end in `-step-000100`.
        hub_merged_model_id (`str`, *optional*):
            Repository on the Hub for the merged model; checkpoints go to its branches `step-000100`. The adapter's is
            `hub_model_id`, with `push_to_hub`.
        hub_merged_private_repo (`bool`, *optional*):
            Whether that repository is private. Defaults to `hub_private_repo`.
        hub_merged_revision (`str`, *optional*):
            Branch for the merged model. Defaults to the main one.
        hub_merged_tag (`str`, *optional*):
            Tag for the merged model.
        hub_overwrite (`bool`, *optional*, defaults to `False`):
            Whether the pushes may replace what the repositories hold of another run.
    """

    merge_output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the merged model. Without it, training ends with the adapter."},
    )
    merge_scale: float = field(
        default=1.0, metadata={"help": "Factor of the adapter: instruct model + scale × adapter."}
    )
    merge_overwrite: bool = field(
        default=False,
        metadata={"help": "Replace an existing merge_output_dir once the new model is complete."},
    )
    merge_saved_modules: str | None = field(
        default=None,
        metadata={"help": "`replace` by, or `ignore`, what was trained whole (lora_modules_to_save)."},
    )
    merge_at_every_checkpoint: bool = field(
        default=False,
        metadata={"help": "Merge every checkpoint too, into merge_output_dir with -step-000100 after its name."},
    )
    hub_merged_model_id: str | None = field(
        default=None,
        metadata={
            "help": "Repository for the merged model, such as user/name; checkpoints go to branches step-000100."
        },
    )
    hub_merged_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether it is private. Defaults to hub_private_repo."}
    )
    hub_merged_revision: str | None = field(
        default=None, metadata={"help": "Branch for the merged model. Defaults to the main one."}
    )
    hub_merged_tag: str | None = field(default=None, metadata={"help": "Tag for the merged model."})
    hub_overwrite: bool = field(default=False, metadata={"help": "Replace what the repositories hold of another run."})

    def __post_init__(self):
        for name in ("merge_output_dir", "hub_merged_model_id", "hub_merged_revision", "hub_merged_tag"):
            # On the command line, where a number is unset by the same word
            if str(getattr(self, name)).lower() == "none":
                setattr(self, name, None)
        if self.merge_saved_modules not in (None, "replace", "ignore"):
            raise ValueError(
                f"`merge_saved_modules` is {self.merge_saved_modules!r}; choose `replace` or `ignore`, or unset it."
            )

    @property
    def is_asked_for(self) -> bool:
        """Whether there is anything to merge or to push."""
        return bool(self.merge_output_dir or self.merge_at_every_checkpoint or self.hub_merged_model_id)


# What `--help` shows of the some 250 fields; `--help_all` shows the rest
_SECTIONS = {
    "models": "model_name_or_path model_revision instruct_model_name_or_path instruct_model_revision "
    "instruct_model_init_kwargs dtype attn_implementation load_in_4bit",
    "data": "dataset_name dataset_config dataset_train_split dataset_test_split prompt_column prompt_template "
    "completion_column completion_template completion_choices skip_empty_rows system_prompt prompt_suffix "
    "chat_template_kwargs max_samples sample_seed max_length packing completion_only_loss assistant_only_loss",
    "annotation": "annotator annotation_engine annotation_base_url annotation_tokens_per_batch annotation_cache_dir",
    "GIFT": "confidence_exponent confidence_floor eos_confidence weight_normalization",
    "adapter": "use_peft lora_r lora_alpha lora_dropout lora_target_modules use_rslora",
    "training": "output_dir learning_rate lr_scheduler_type warmup_steps num_train_epochs max_steps "
    "per_device_train_batch_size gradient_accumulation_steps global_batch_size bf16 gradient_checkpointing eval_strategy save_strategy "
    "logging_steps seed use_cpu deepspeed resume_from_checkpoint",
    "merge": "merge_output_dir merge_scale merge_overwrite merge_saved_modules merge_at_every_checkpoint",
    "Hub": "push_to_hub hub_model_id hub_private_repo hub_strategy hub_merged_model_id hub_merged_private_repo "
    "hub_merged_revision hub_merged_tag hub_overwrite",
}


def recipe_file(name: str = "") -> str:
    """
    Finds a recipe.

    Args:
        name (`str`, *optional*, defaults to `""`):
            Path of a YAML file, or of one in the recipes folder, such as `llama-3.1-8b/math.yaml`; that folder is inside an
            installed package, where its path, too, may begin with `recipes/`.

    Returns:
        `str`: Path of the file.

    Raises:
        `FileNotFoundError`: If there is none.
    """
    for path in (name, recipes_folder() / name, recipes_folder().parent / name):
        if os.path.isfile(path):
            return str(path)
    raise FileNotFoundError(
        f"There is no recipe file `{name}`. Give `--config` the path of a YAML file, or of one in {recipes_folder()}."
    )


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # `--max_length, --max-length MAX_LENGTH` is one spelling too many to read
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, 'VALUE')}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is argparse.SUPPRESS or action.nargs == 0:
            return action.help
        return f"{action.help} (default: %(default)s)"


class RecipeParser(TrlParser):
    """
    [`~trl.TrlParser`] with a help a person can read: the fields that matter for GIFT, in the order of a recipe.

    Args:
        dataclass_types (`list[type]`):
            Dataclasses of the arguments.
        sections (`dict[str, str]`):
            Names of the fields that `--help` shows, by section.
        kwargs (`dict[str, Any]`):
            Keyword arguments of [`~trl.TrlParser`].
    """

    def __init__(self, dataclass_types: list[type], sections: dict[str, str], **kwargs):
        super().__init__(dataclass_types, formatter_class=_HelpFormatter, **kwargs)
        self._sections = sections
        self.add_argument(
            "--help_all", action=_HelpAll, help="show every field, those inherited from TRL and transformers too"
        )

    def parse_args_and_config(self, args: list[str] | None = None, **kwargs) -> tuple:
        parsed = super().parse_args_and_config(self.find_recipe(sys.argv[1:] if args is None else args), **kwargs)
        for values in parsed:
            for name in ("model_name_or_path", "instruct_model_name_or_path"):
                if str(getattr(values, name, None)).startswith("~"):  # in a recipe, where no shell expands it
                    setattr(values, name, os.path.expanduser(getattr(values, name)))
        return parsed

    def find_recipe(self, args: list[str]) -> list[str]:
        """
        Finds and reads the recipe that arguments name.

        Args:
            args (`list[str]`):
                Arguments, with `--config` or without.

        Returns:
            `list[str]`: The arguments, in which `--config` is followed by the path of a file.

        Raises:
            `FileNotFoundError`: If there is no such recipe.
            `ValueError`: If it is not valid YAML, or has a boolean where a word is meant, or a fraction where a whole number is.
        """
        args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        if "--config" in args:
            position = args.index("--config") + 1
            args[position : position + 1] = [recipe_file(*args[position : position + 1])]
            self._check_recipe_file(args[position])
        return args

    def _check_recipe_file(self, path: str) -> None:
        recipe = read_yaml(path)
        choices = {action.dest for action in self._actions if action.choices}
        whole = {
            name
            for dataclass in self.dataclass_types
            for name, hint in get_type_hints(dataclass).items()
            if {*(get_args(hint) or (hint,))} <= {int, type(None)}
        }
        for key, value in (recipe if isinstance(recipe, dict) else {}).items():
            if key in choices and isinstance(value, bool):
                raise ValueError(
                    f"`{key}` is {value} in the recipe, because YAML reads an unquoted no, off, yes or on as a boolean. "
                    f'Quote it: `{key}: "{"yes" if value else "no"}"`.'
                )
            if key in whole and isinstance(value, float):
                remedy = f" Write `{key}: {value:.0f}`." if value.is_integer() else ""
                raise ValueError(f"`{key}` is {value} in the recipe, where a whole number is meant.{remedy}")

    def format_help(self, everything: bool = False) -> str:
        formatter = self._get_formatter()
        formatter.add_usage("%(prog)s --config RECIPE.yaml [--FIELD VALUE ...]", [], [])
        formatter.add_text(self.description)
        actions = {action.dest: action for action in reversed(self._actions)}
        actions.pop("help"), actions.pop("help_all")
        for title, names in self._sections.items():
            formatter.start_section(title)
            formatter.add_arguments([actions.pop(name) for name in names.split()])
            formatter.end_section()
        if everything:
            formatter.start_section("inherited from TRL and transformers")
            formatter.add_arguments(list(actions.values()))
            formatter.end_section()
        elif actions:
            formatter.add_text(f"{len(actions)} more fields are inherited from TRL and transformers: see --help_all.")
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True), end="")
        parser.exit()


def make_recipe_parser(
    prog: str | None = None,
    description: str | None = None,
    epilog: str | None = None,
    extra: tuple[type, dict[str, str]] | None = None,
    without: tuple[str, ...] = (),
) -> RecipeParser:
    """
    Parser of a recipe.

    Args:
        prog (`str`, *optional*):
            Name of the program in the help.
        description (`str`, *optional*):
            Text before the options.
        epilog (`str`, *optional*):
            Text after the options.
        extra (`tuple[type, dict[str, str]]`, *optional*):
            Dataclass of further arguments, with their sections in the help.
        without (`tuple[str, ...]`, *optional*, defaults to `()`):
            Sections that the help leaves to `--help_all`: a recipe may set their fields, the command does not read them.

    Returns:
        [`RecipeParser`]: Its `parse_args_and_config` gives a [`GIFTScriptArguments`], [`GIFTConfig`],
        [`~trl.ModelConfig`], [`~trl.DatasetMixtureConfig`] and [`MergeArguments`], then the extra one.
    """
    types = [GIFTScriptArguments, GIFTConfig, ModelConfig, DatasetMixtureConfig, MergeArguments]
    sections = {title: names for title, names in _SECTIONS.items() if title not in without}
    if extra is not None:
        types.append(extra[0])
        sections = {**extra[1], **sections}
    return RecipeParser(types, sections, prog=prog, description=description, epilog=epilog)
