"""What a run tells: lines to the terminal and the log file, a progress bar, and figures to JSONL and TensorBoard."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from experiments.ending import RunError
from experiments.record import write_whole

log = logging.getLogger("experiments")


def start_logging(workdir: Path, console: Console) -> None:
    """Sends the log to ``log.txt`` in the working directory, and, from the first process, to the terminal."""
    process = jax.process_index()
    file = logging.FileHandler(workdir / ("log.txt" if process == 0 else f"log-{process}.txt"), encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers: list[logging.Handler] = [file]
    if process == 0:
        handlers.append(
            RichHandler(console=console, show_path=False, show_level=False, log_time_format="[%X]")
            if console.is_terminal
            else logging.StreamHandler(console.file)
        )
    for name in ("experiments", "ltp_jax"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        _replace_handlers(logger, handlers)
        logger.propagate = False
    # What Orbax and its event loops say of background threads belongs in the file: the user gets one message of ours.
    for name in ("absl", "asyncio"):
        background = logging.getLogger(name)
        _replace_handlers(background, [file])
        background.propagate = False


def _replace_handlers(logger: logging.Logger, handlers: list[logging.Handler]) -> None:
    """Gives a logger these handlers. The file of the run before it in this process is closed."""
    for old in logger.handlers:
        if isinstance(old, logging.FileHandler):
            old.close()
    logger.handlers = list(handlers)


class ImagesPerSecond(ProgressColumn):
    """The rate of the last steps, of so many images each: what compilation and evaluations take passes out of it."""

    def __init__(self, images: int):
        super().__init__()
        self._images = images

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed * self._images:,.0f} images/s")


@contextlib.contextmanager
def progress_bar(console: Console, title: str, total: int, done: int, images: int) -> Iterator[Callable[[], None]]:
    """A bar with rate and time left on a terminal; nothing elsewhere, nor on any process but the first.

    Yields the function to call after every step of ``images`` images.
    """
    if not console.is_terminal or jax.process_index() != 0:
        yield lambda: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        ImagesPerSecond(images),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda: progress.advance(task)


class MetricsWriter:
    """Figures of a run as lines of JSON, and as TensorBoard files if asked. The first process writes; others do not.

    Args:
      workdir: where ``metrics.jsonl`` and ``tensorboard/`` are.
      tensorboard: write TensorBoard files too.

    Raises:
      RunError: if TensorBoard files are asked for and tensorboardX is not installed.
    """

    def __init__(self, workdir: Path, tensorboard: bool):
        self._path = workdir / "metrics.jsonl"
        self._board: Callable[[str, int], Any] | None = None
        self._boards: dict[str, Any] = {}
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:  # in all processes, so that none waits for the first one
                raise RunError("--tensorboard needs the package tensorboardX: pip install tensorboardX") from error
        if jax.process_index() != 0:
            self._path = None
        elif tensorboard:
            # Each stage is a run of its own to TensorBoard: it drops all points of a run from a step on.
            self._board = lambda stage, step: SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=step)
        self._told = {mark for _, mark in self._lines()}

    def rewind(self, stage: str, step: int) -> None:
        """Begins a stage, or goes on with it from a step, and drops what an interrupted run told of later ones.

        What is told again of the step itself is not written again.
        """
        if self._board is not None:
            self._boards[stage] = self._board(stage, step + 1)
        if self._path is None or not self._path.exists():
            return
        kept = {line: mark for line, mark in self._lines() if mark[0] != stage or mark[2] <= step}
        self._told = set(kept.values())
        write_whole(self._path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> Iterator[tuple[str, tuple[str, str, int]]]:
        """The lines that are there, each with its stage, kind and step."""
        if self._path is None or not self._path.exists():
            return
        for line in self._path.read_bytes().splitlines():
            # A line may have been cut off with its run.
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
                row = json.loads(line)
                yield line.decode(), (str(row["stage"]), str(row["kind"]), int(row["step"]))

    def write(self, stage: str, kind: str, step: int, figures: Mapping[str, Any]) -> None:
        """Adds a line: the stage of the run, ``"train"`` or ``"entry"``, the step, and the figures."""
        if self._path is None or (stage, kind, step) in self._told:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": stage, "kind": kind, "step": step} | dict(figures)) + "\n")
        if stage in self._boards:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._boards[stage].add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Writes out what is buffered."""
        for board in self._boards.values():
            board.close()
