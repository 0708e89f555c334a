"""What the run wrote down of its inside while it trained: every metric with a name behind a slash, and the noise."""

from __future__ import annotations

from collections import defaultdict

from rich.progress import Progress

from tools.inspecting.subject import Subject

_AVERAGED = 10

# metric -> name of the module or parameter -> (step, value), in order; gaps left out
History = dict[str, dict[str, list[tuple[int, float]]]]


def look_at_history(subject: Subject, progress: Progress) -> History:
    """Of the steps up to the checkpoint."""
    history: History = defaultdict(lambda: defaultdict(list))
    for record in progress.track(subject.records, description="metrics"):
        for key, value in record.items():
            metric, slash, name = key.partition("/")
            if slash and isinstance(value, int | float):
                history[metric][name].append((record["step"], float(value)))
    noise = _noise_scale(subject)
    if noise:
        history["noise_scale"]["the model"] = noise
    return {metric: dict(of) for metric, of in history.items()}


def _noise_scale(subject: Subject) -> list[tuple[int, float]]:
    """In tokens, from the averages over the last ``_AVERAGED`` records: of one step alone it is mostly noise, since it
    is a quotient of two estimates (arXiv 1812.06162, appendix A.1)."""
    seen = [record for record in subject.records if record.get("noise_covariance_trace") is not None]
    found = []
    for end, record in enumerate(seen, start=1):
        part = seen[max(0, end - _AVERAGED) : end]
        gradient, trace = (
            sum(one[key] for one in part) for key in ("noise_gradient_squared", "noise_covariance_trace")
        )
        if gradient > 0:
            found.append((record["step"], trace / gradient))
    return found
