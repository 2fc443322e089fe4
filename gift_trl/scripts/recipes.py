"""Where the recipes are."""

from pathlib import Path

import gift_trl


def recipes_folder() -> Path:
    """
    Folder of the recipes: inside an installed package, beside it in a checkout.

    Returns:
        `Path`: The folder.

    Raises:
        `FileNotFoundError`: If the installation has none.
    """
    package = Path(gift_trl.__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "quickstart").is_dir():
            return folder
    raise FileNotFoundError(
        f"The recipes are missing beside {package}. Install gift_trl again from its repository or its wheel."
    )
