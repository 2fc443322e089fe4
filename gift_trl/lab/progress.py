"""One progress display, shared by whoever reports to it."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_display(progress: Progress | None = None) -> Iterator[Progress]:
    """
    Yields `progress`, or a display of its own that is stopped at the end.

    Args:
        progress ([`~rich.progress.Progress`], *optional*):
            A running display.

    Yields:
        [`~rich.progress.Progress`]: The display to add tasks to.
    """
    if progress is not None:
        yield progress
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as display:
        yield display
