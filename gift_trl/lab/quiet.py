"""Libraries that are to say nothing while the lab reports."""

import logging
import warnings

import datasets
import transformers


def silence_libraries() -> None:
    """Turns off what a newcomer cannot act on; errors are still shown."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "peft", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
