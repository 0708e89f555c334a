"""Tasks by name, from lm_eval, from here and from the user's folder; a model's results on them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate  # type: ignore[import-untyped]
from lm_eval.api.model import LM  # type: ignore[import-untyped]
from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from models.errors import ConfigError

HERE = Path(__file__).parent  # our own group and task


class Tasks(TaskManager):
    """lm_eval's manager, in which what cannot be loaded or asked is a ConfigError.

    ``longest`` is the most tokens that a task's generation may have.
    """

    def __init__(self, folders: Sequence[Path], *, stock: bool, longest: int) -> None:
        super().__init__(include_path=list(folders), include_defaults=stock)
        self._longest = longest

    def load(self, task_list: Any) -> Any:
        try:
            loaded = super().load(task_list)
        except Exception as error:  # of the harness, of datasets, of functions in the user's files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, ConnectionError):
                reason += "; fetch it once with a network, or write tasks with data_files here and --include-path"
            raise ConfigError(f"--tasks {','.join(task_list)}: cannot be loaded: {reason}") from error
        for name, task in loaded["tasks"].items():
            self._check(name, task)
        return loaded

    def _check(self, name: str, task: Any) -> None:
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"--tasks: {name} runs code that the model writes: use lm_eval itself, in a sandbox")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"--tasks: {name} shows images, and the model reads text: leave it out")
        if task.OUTPUT_TYPE != "generate_until":
            return
        count = normalize_gen_kwargs(task.config.generation_kwargs or {})["max_gen_toks"]
        if count >= self._longest:
            raise ConfigError(
                f"--tasks: {name} generates up to {count} tokens, which leaves no room for its question in the model's "
                f"context of {self._longest}: leave it out"
            )


def open_tasks(names: Sequence[str], folder: Path | None, longest: int) -> Tasks:
    """What can load ``names``, which are tasks, tags or groups. ConfigError for a name that is none, with the nearest.

    Those of ``folder`` go before lm_eval's of the same name.
    """
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(f"--include-path {folder} is not there: give a folder with tasks as lm_eval's YAML files")
        own = Tasks([folder], stock=False, longest=longest)
        if set(names) <= set(own.all_subtasks):
            return own  # lm_eval's own files are 14,000, and take half a minute to read
    logging.getLogger("lm_eval.tasks._index").setLevel(
        logging.ERROR
    )  # it warns of those that take the place of its own
    with Console(stderr=True).status("reading lm_eval's tasks"):
        tasks = Tasks([HERE, *([] if folder is None else [folder])], stock=True, longest=longest)
    for name in names:
        if name not in tasks.task_index:
            (close,) = difflib.get_close_matches(name, tasks.all_tasks, n=1, cutoff=0)
            raise ConfigError(f"--tasks: there is no {name}, did you mean {close!r}? lm_eval ls tasks lists them")
    return tasks


def ask(lm: LM, names: Sequence[str], tasks: Tasks, limit: int | None) -> dict[str, Any]:
    """lm_eval's results, on the first ``limit`` documents of each task (None for all), with its standard seeds."""
    found: dict[str, Any] = simple_evaluate(
        lm, tasks=list(names), task_manager=tasks, limit=limit, log_samples=False, batch_size=lm.batch_size
    )
    return found


def entries(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task or group -> its metrics by lm_eval's names (``acc,none``, ``acc_stderr,none``) and how it was asked."""
    made: dict[str, dict[str, Any]] = {}
    for name, metrics in found["results"].items():
        made[name] = {key: value for key, value in metrics.items() if "," in key}
        made[name]["documents"] = metrics.get("sample_len")
        made[name]["num_fewshot"] = found["n-shot"].get(name)
        made[name]["version"] = found["versions"].get(name)
        made[name]["lm_eval"] = version("lm_eval")
    return made


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `entries` gives, a row a metric, with standard errors."""
    made = Table("task", "shots", "documents", "metric", "value", "", "standard error")
    for i in (1, 2, 4, 6):
        made.columns[i].justify = "right"
    for name, entry in found.items():
        title = [name, str(entry["num_fewshot"] or 0), str(entry["documents"] or "")]
        for key, value in entry.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = entry.get(f"{metric}_stderr,{answers}")
            ends = ("±", f"{error:.4f}") if isinstance(error, int | float) else ("", "")
            made.add_row(*title, metric if answers == "none" else f"{metric} ({answers})", f"{value:.4f}", *ends)
            title = ["", "", ""]
    return made
