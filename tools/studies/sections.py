"""The report as Markdown, section by section."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import yaml

from models import Transformer, parameter_roles
from pretrain.cli import flatten
from pretrain.optimizers import build_optimizer, describe
from tools.studies.choosing import scores
from tools.studies.grid import Arm, Study, Tuned, named, shown, tuned_keys
from tools.studies.outcomes import Result
from tools.studies.statistics import CONFIDENCE, Interval
from tools.studies.verdict import Verdict, tokens


def sections(verdict: Verdict, figures: Mapping[str, str]) -> str:
    """``figures``: the path of each by its name."""
    parts = [_head(verdict), _result(verdict, figures), _comparisons(verdict, figures)]
    parts += [_curves(figures), _tuning(verdict, figures), _cost(verdict), _optimizers(verdict), _method(verdict)]
    parts += [_cells(verdict), _repeat(verdict)]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(verdict: Verdict) -> str:
    """For a terminal: the cautions and the result."""
    return "\n".join([*(f"warning: {line}" for line in verdict.cautions), "", result_table(verdict)])


def result_table(verdict: Verdict) -> str:
    """A row for each arm."""
    header = [
        *verdict.study.factors,
        "chosen",
        "validation loss",
        f"{CONFIDENCE:.0%} interval",
        "bits per byte",
        "loss by seed",
    ]
    rows = []
    for arm in verdict.study.candidates:
        found, bits = verdict.loss(arm), verdict.bits_per_byte(arm)
        loss = [f"{found.mean:.4f}", _edges(found)] if found else [f"none: {verdict.why_no_loss(arm)}", ""]
        chosen = shown(verdict.chosen[arm]) if arm in verdict.chosen else "none"
        if arm in verdict.edges:
            chosen += " **(at the edge)**"
        seeds = ", ".join("–" if one.loss is None else f"{one.loss:.4f}" for one in verdict.finals(arm))
        rows.append([*arm, chosen, *loss, "" if bits is None else f"{bits:.4f}", seeds])
    return table(header, rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; whatever is in a cell stays in it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell_text, line)) + " |" for line in lines)


def _cell_text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", " ")


def _edges(found: Interval) -> str:
    return "" if found.low is None else f"{found.low:.4f} to {found.high:.4f}"


def _image(figures: Mapping[str, str], name: str, caption: str) -> str:
    return f"![{caption}]({figures[name]})" if name in figures else ""


def _block(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _details(title: str, content: str) -> str:
    """Folded away; what is in it is Markdown still."""
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{content}\n\n</details>'


def _head(verdict: Verdict) -> str:
    study = verdict.study
    first = tuple(next(iter(choices)) for choices in study.factors.values())
    sizes = " x ".join(f"{len(choices)} {factor}" for factor, choices in study.factors.items())
    words = f"{len(study.candidates)} arms ({sizes}), {tokens(study.example(first)):,} tokens a run."
    cautions = "\n".join(f"- {line}" for line in verdict.cautions)
    return _block(f"# {study.name}", words, "## Cautions" if cautions else "", cautions)


def _result(verdict: Verdict, figures: Mapping[str, str]) -> str:
    caption = "Final validation loss: seeds as dots, their mean and its interval as a bar"
    return _block("## Result", result_table(verdict), _image(figures, "final-losses", caption))


def _comparisons(verdict: Verdict, figures: Mapping[str, str]) -> str:
    if len(verdict.study.seeds) == 1:
        return _block("## Comparisons", "None: with one seed a difference cannot be told from chance.")
    if not verdict.comparisons:
        return ""
    rows = []
    for one in verdict.comparisons:
        if one.test is None or one.adjusted is None:
            rows.append([one.name, "not compared", one.reason, "", "", ""])
        else:
            found = one.test.difference
            values = [_probability(one.test.p), _probability(one.adjusted), str(found.n)]
            rows.append([one.name, f"{found.mean:+.4f}", _signed(found), *values])
    count = sum(one.test is not None for one in verdict.comparisons)
    words = (
        "Paired by seed: both arms saw the same tokens in the same order. p is that of a two-sided paired t test, "
        f"Holm's p is corrected for all {count} tests of this table; intervals are not corrected. Below zero the first "
        "arm is better."
    )
    header = ["arms", "difference (nats)", f"{CONFIDENCE:.0%} interval", "p", "p (Holm)", "seeds"]
    caption = "Differences with their intervals; filled where Holm's p is below 0.05"
    return _block("## Comparisons", words, table(header, rows), _image(figures, "differences", caption))


def _signed(found: Interval) -> str:
    return f"{found.low:+.4f} to {found.high:+.4f}"


def _probability(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def _curves(figures: Mapping[str, str]) -> str:
    caption = "Training loss of the final runs: the mean over seeds, the band from the least to the greatest of them"
    return _block("## Loss curves", image) if (image := _image(figures, "loss-curves", caption)) else ""


def _tuning(verdict: Verdict, figures: Mapping[str, str]) -> str:
    keys = tuned_keys(verdict.study)
    if not keys:
        return _block("## Tuning", "None: every arm was given one value of everything.")
    caption = "Validation loss over {}: the mean over tuning seeds, each seed a dot"
    images = [_image(figures, f"sensitivity-{key}", caption.format(key)) for key in keys]
    means, rows = scores(verdict.tuning), []
    for arm, candidates in verdict.study.candidates.items():
        tried = [_candidate(verdict, arm, tuned, means) for tuned in candidates if (arm, tuned) in means]
        rows.append([*arm, ", ".join(key for key, _ in candidates[0]), "; ".join(tried) or "one value, not tried"])
    header = [*verdict.study.factors, "tuned", "validation loss by value, the chosen one bold"]
    return _block("## Tuning", *images, table(header, rows))


def _candidate(verdict: Verdict, arm: Arm, tuned: Tuned, means: Mapping[tuple[Arm, Tuned], float]) -> str:
    """Its values and its mean loss over the tuning seeds, or what kept it from having one."""
    states = Counter(one.state for one in verdict.tried(arm) if one.cell.tuned == tuned and one.loss is None)
    loss = ", ".join(f"{n} {state}" for state, n in states.items()) or f"{means[arm, tuned]:.4f}"
    text = f"{' and '.join(f'{value:g}' for _, value in tuned)}: {loss}"
    return f"**{text}**" if verdict.chosen.get(arm) == tuned else text


def _cost(verdict: Verdict) -> str:
    rows = []
    for arm in verdict.study.candidates:
        tried, finals = verdict.tried(arm), verdict.finals(arm)
        rate, memory = verdict.speed(arm)
        counts = [str(len(verdict.study.candidates[arm])), str(len(tried)), _count(tried, "stopped early")]
        counts += [_count(tried, "diverged"), str(len(finals)), _count(finals, "diverged")]
        speed = ["" if rate is None else f"{rate:,.0f}", "" if memory is None else f"{memory:.2f}"]
        rows.append([*arm, *counts, f"{_length(verdict.study, arm):,}", *speed])
    header = ["values tried", "tuning runs", "stopped early", "diverged", "final runs", "diverged"]
    header = [*verdict.study.factors, *header, "tokens a run", "tokens/s", "memory (GB)"]
    words = (
        "tokens/s is the median over the final runs' logged steps, memory the greatest of a process. Cells that ran "
        "side by side shared the machine: speeds are comparable only as far as they shared it alike."
    )
    return _block("## Budget and cost of each arm", table(header, rows), words)


def _length(study: Study, arm: Arm) -> int:
    return tokens(study.example(arm))


def _count(results: Sequence[Result], state: str) -> str:
    return str(sum(result.state == state for result in results))


def _optimizers(verdict: Verdict) -> str:
    """What the chosen settings amount to, as a run prints it at its start."""
    parts = []
    for arm in verdict.chosen:
        config = verdict.finals(arm)[0].config
        if config.model.vocab_size is None:  # it has not begun
            continue
        with torch.device("meta"):
            model = Transformer(config.model)
        parameters = dict(model.named_parameters())
        optimizer = build_optimizer(parameters, parameter_roles(model), config.optimizer)
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        lines = [f"{named(arm)}: {sum(sizes.values()):,} parameters", *describe(optimizer, config.optimizer, sizes)]
        parts.append("\n".join(lines))
    if not parts:
        return ""
    words = "At the peak of the schedule. The effective decay is the share of a weight that one step takes away."
    return _block("## Effective learning rate and weight decay", words, _code("\n\n".join(parts)))


def _method(verdict: Verdict) -> str:
    return "## Method\n\n" + "\n".join(f"- {line}" for line in _method_lines(verdict))


def _method_lines(verdict: Verdict) -> Iterator[str]:
    study = verdict.study
    seeds = ", ".join(map(str, study.seeds))
    if study.tune_seeds is None:
        yield (
            f"Every candidate of every arm is run under the seeds {seeds}; the one with the lowest mean validation "
            "loss counts."
        )
    else:
        by = ", ".join(map(str, study.tune_seeds))
        yield (
            f"Every candidate of every arm is run under the tuning seeds {by}; the one with the lowest mean validation "
            f"loss is then run under the final seeds {seeds}, which are what is reported."
        )
    yield (
        "Tuning and reporting use the same validation text, so what is chosen fits that text a little: losses are "
        "optimistic as absolute values, by design about equally for arms with equal budgets."
    )
    yield (
        f"Intervals are Student's t with {CONFIDENCE:.0%} confidence over {len(study.seeds)} final seeds; with one "
        "there are none. A seed sets the first weights and the order of the data; intervals say nothing of other "
        "texts, sizes or lengths."
    )
    yield (
        "Compared are every arm with the first, and with the arms that have the first choice of one factor and else "
        "its own: the order in the study's file says what is the reference, before any result is known."
    )
    yield (
        "A run diverges when its loss or gradient norm is no longer finite. A value that diverges under a tuning seed "
        "counts as worse than all that finish."
    )
    if study.stop_early is not None:
        yield (
            f"Early stopping: a tuning run past {study.stop_early.after:.0%} of its steps is stopped once its training "
            f"loss is more than {study.stop_early.worse_by:g} nats above the lowest that another value of the same arm "
            "and seed had at the same step. It counts as worse than any that finished. Final runs are never stopped."
        )


def _cells(verdict: Verdict) -> str:
    rows = []
    final = {result.cell for result in verdict.final}
    tuning = {result.cell for result in verdict.tuning}
    for result in verdict.cells:
        phase = " and ".join(word for word, cells in (("tuning", tuning), ("final", final)) if result.cell in cells)
        loss = "" if result.loss is None else f"{result.loss:.4f}"
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        rows.append([result.cell.config.name, phase, result.state, loss, bits, result.note])
    header = ["cell", "for", "state", "validation loss", "bits per byte", ""]
    return _block("## Every cell", _details(f"{len(rows)} cells", table(header, rows)))


def _repeat(verdict: Verdict) -> str:
    study = verdict.study
    tree = study.model_dump(exclude_unset=True)
    configs = {result.cell.config.name: flatten(result.config) for result in verdict.cells}
    environments = {cell.config.name: _flat(one) for cell, one in verdict.environments.items()}
    return _block(
        "## To repeat it",
        _code(" ".join(sys.orig_argv)),
        _details("the study's file, its bases taken in", _code(yaml.safe_dump(tree, sort_keys=False), "yaml")),
        _details("the configuration of every cell", _shared(configs)),
        _details("versions, revision and hardware of every cell", _shared(environments)),
    )


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Without what differs in every run and tells nothing."""
    packages = {f"packages.{name}": version for name, version in environment.get("packages", {}).items()}
    return {key: value for key, value in environment.items() if key not in ("packages", "command")} | packages


def _shared(named_values: Mapping[str, Mapping[str, Any]]) -> str:
    """What all have in common, once, and where they differ a table: together each of them whole."""
    if not named_values:
        return "No run has begun."
    keys = dict.fromkeys(key for values in named_values.values() for key in values)
    common, differing = {}, []
    for key in keys:
        texts = {name: json.dumps(values.get(key)) for name, values in named_values.items()}
        if len({*texts.values()}) == 1:
            common[key] = next(iter(texts.values()))
        elif key != "name":  # which every row begins with
            differing.append(key)
    lines = "\n".join(f"{key}: {value}" for key, value in common.items())
    rows = [[name, *(json.dumps(values.get(key)) for key in differing)] for name, values in named_values.items()]
    return _block("In common:", _code(lines), table(["cell", *differing], rows) if differing else "")


def _code(text: str, language: str = "") -> str:
    return f"```{language}\n{text.rstrip()}\n```"
