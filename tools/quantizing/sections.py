"""The report as Markdown, section by section."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import exp, isnan
from statistics import fmean

from tools.quantizing.formats import Treatment
from tools.quantizing.measuring import ALL, Measured, Question
from tools.quantizing.words import change_words, difference_words, format_words, includes_zero, treatment_words
from tools.studies.sections import table
from tools.studies.statistics import CONFIDENCE

TITLE = "Numerics: what 8 bits do to loss"


def sections(measured: Sequence[Measured], question: Question, figures: Mapping[str, str]) -> str:
    """``figures``: the path of each by its name."""
    parts = [f"# {TITLE}", _answer(measured, question), "## Runs", _runs(measured)]
    parts += ["## Change of loss", changes_table(measured), _legend(measured)]
    parts += [_image(figures, "changes", "Change of validation loss and its interval; hollow where it includes zero")]
    parts += [_comparison(measured)]
    if question.layers is not None:
        parts += [_layers(measured, question.layers, figures), _signals(measured, question.layers, figures)]
    parts += ["## Method", _method(question)]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(measured: Sequence[Measured], question: Question) -> str:
    """For a terminal: the runs, the table and what stands out."""
    parts = [_runs(measured), changes_table(measured), _legend(measured), _comparison_table(measured)]
    return "\n\n".join(part for part in [*parts, _answer(measured, question)] if part)


def changes_table(measured: Sequence[Measured]) -> str:
    """A row for each treatment, a column for each run."""
    rows = [
        [treatment_words(treatment), *(change_words(run.change(run.treated[treatment])) for run in measured)]
        for treatment in measured[0].treated
    ]
    return table(["rounded", *(run.name for run in measured)], rows)


def _legend(measured: Sequence[Measured]) -> str:
    counts = sorted({len(run.losses) for run in measured})
    return (
        f"Change of loss to fp32 in nats per token, ± the half-width of its {CONFIDENCE:.0%} interval "
        f"over {' or '.join(map(str, counts))} paired windows, and the change of perplexity. n.s.: zero is in the "
        "interval."
    )


def _answer(measured: Sequence[Measured], question: Question) -> str:
    return "\n".join(f"- {line}" for run in measured for line in _findings(run, question))


def _findings(run: Measured, question: Question) -> Iterator[str]:
    """What stands out in a run: the worst treatment, and the worst linear."""
    found = {treatment: run.change(losses) for treatment, losses in run.treated.items()}
    noise = sum(map(includes_zero, found.values()))
    worst = max(found, key=lambda treatment: found[treatment].mean)
    if includes_zero(found[worst]):
        yield f"{run.name}: no row's loss is above fp32's by more than chance would have it."
    else:
        yield (
            f"{run.name}: the most is lost by {treatment_words(worst)}: {change_words(found[worst])}; {noise} of "
            f"{len(found)} rows cannot be told from no change."
        )
    if question.layers is None:
        return
    alone = {part: run.change(losses) for part, losses in run.layers.items() if ALL not in part}
    part = max(alone, key=lambda part: alone[part].mean)
    yield (
        f"{run.name}, one linear at a time ({treatment_words(question.layers)}): {part[1]} of block {part[0]} loses "
        f"most, {difference_words(alone[part])}, of {difference_words(run.change(run.layers[ALL, ALL]))} for all."
    )


def _runs(measured: Sequence[Measured]) -> str:
    rows = []
    for run in measured:
        loss, precision = fmean(run.losses), run.config.precision
        trained_in = precision.compute if precision.fp8 == "none" else f"{precision.compute}, fp8 {precision.fp8}"
        sizes = [f"{run.parameters:,}", f"{run.step:,}", trained_in]
        rows.append([run.name, run.config.model.plan, *sizes, f"{loss:.4f}", f"{exp(loss):.2f}"])
    return table(["run", "plan", "parameters", "step", "trained in", "loss in fp32", "perplexity"], rows)


def _comparison(measured: Sequence[Measured]) -> str:
    rows = _comparison_table(measured)
    if not rows:
        return ""
    words = (
        f"How much more (above zero) or less than {measured[0].name} a run loses by the same rounding: differences of "
        "the changes, in nats per token, paired by window. They are between these checkpoints; what other seeds would "
        "show, windows cannot tell."
    )
    return "\n\n".join([f"## Against {measured[0].name}", words, rows])


def _comparison_table(measured: Sequence[Measured]) -> str:
    """Of the runs that read the same windows as the first; empty if there is none."""
    first, *others = measured
    others = [run for run in others if run.reads_like(first)]
    if not others:
        return ""
    rows = [
        [
            treatment_words(treatment),
            *(difference_words(run.change_against(first, treatment)) for run in others),
        ]
        for treatment in first.treated
    ]
    return table(["rounded", *(f"{run.name} − {first.name}" for run in others)], rows)


def _layers(measured: Sequence[Measured], treatment: Treatment, figures: Mapping[str, str]) -> str:
    words = (
        f"One linear at a time in {treatment_words(treatment)}, the rest in fp32; at the edges all linears of a block, "
        "all of a kind, and all. Numbers are 10⁻³ nats per token, in parentheses where the "
        "interval includes zero."
    )
    parts = ["## Layer by layer", words, _image(figures, "layers", "Change of loss with one linear rounded")]
    for run in measured:
        rows = [[str(block), kind, change_words(run.change(losses))] for (block, kind), losses in run.layers.items()]
        parts.append(_details(f"{run.name}: every linear", table(["block", "linear", "change of loss"], rows)))
    return "\n\n".join(parts)


def _signals(measured: Sequence[Measured], treatment: Treatment, figures: Mapping[str, str]) -> str:
    words = (
        f"Signal-to-quantization-noise ratio of {format_words(treatment)}: 10 log10(Σx² / Σ(x − rounded x)²). Of "
        "inputs, means over blocks with the worst block in parentheses; outliers are means over windows: features with "
        "a magnitude above 6 (arXiv 2208.07339), kurtosis (3 for a Gaussian), the largest magnitude over the median "
        "one."
    )
    caption = "Inputs of linears by block: what rounding leaves of them, and their largest magnitude"
    parts = ["## Signal and noise", words, _inputs(measured), _image(figures, "signals", caption), _weights(measured)]
    for run in measured:
        header = [
            "block",
            "input of",
            "per tensor (dB)",
            "per row (dB)",
            "features above 6",
            "kurtosis",
            "largest / median",
        ]
        rows = [
            [str(one.block), one.kinds, *map(_number, (*one.ratio, one.over, one.kurtosis, one.largest))]
            for one in run.inputs
        ]
        parts.append(_details(f"{run.name}: every input", table(header, rows)))
    return "\n\n".join(parts)


def _inputs(measured: Sequence[Measured]) -> str:
    rows = []
    for kinds in dict.fromkeys(one.kinds for run in measured for one in run.inputs):
        for run in measured:
            of = [one for one in run.inputs if one.kinds == kinds]
            if of:
                ratios = [
                    _worst([one.ratio.per_tensor for one in of], min),
                    _worst([one.ratio.per_row for one in of], min),
                ]
                shapes = [[one.over for one in of], [one.kurtosis for one in of], [one.largest for one in of]]
                rows.append([kinds, run.name, *ratios, *(_worst(shape, max) for shape in shapes)])
    return table(
        ["input of", "run", "per tensor (dB)", "per row (dB)", "features above 6", "kurtosis", "largest / median"], rows
    )


def _weights(measured: Sequence[Measured]) -> str:
    rows = []
    for kind in dict.fromkeys(one.kind for run in measured for one in run.weights):
        for run in measured:
            of = [one.ratio for one in run.weights if one.kind == kind]
            if of:
                rows.append([kind, run.name, *(_worst([ratio[i] for ratio in of], min) for i in (0, 1))])
    return table(["weight of", "run", "per tensor (dB)", "per row (dB)"], rows)


def _worst(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> str:
    """The mean over blocks and the worst block, of those that have a value."""
    known = [value for value in values if not isnan(value)]
    return f"{_number(fmean(known))} ({_number(worst(known))})" if known else "–"


def _number(value: float) -> str:
    return "–" if isnan(value) else f"{value:.1f}"


def _method(question: Question) -> str:
    lines = [
        "Rounding is simulated: scale = max |x| / the largest number of the format, symmetric; operands are rounded "
        "to the nearest value of the scaled grid (int8: −127 to 127; e4m3: to 448; e5m2: to 57344) and multiplied in "
        "fp32. It says nothing about speed.",
        "Per tensor: one scale for a weight, and one for the activations of a sequence. Per row: one for each output "
        "channel of a weight, and one for each token. Scales of activations are those of the data at hand (dynamic).",
        f"Rounded are the linears of the blocks{' and the head' if question.head else ''}; embeddings"
        f"{'' if question.head else ', head'}, norms, attention and residual stream are fp32. Linears that make their "
        "weight of parameters (standardized, sigmaReparam) have the weight rounded that multiplies.",
        "bf16: the same linears, without scales, as a reference.",
        "Windows are spread evenly over the validation split, without a last one that is not full. Losses are paired "
        "by window; intervals are Student's t over the mean differences of windows, not corrected for the number of "
        "rows.",
        "Rounding is one fixed perturbation of the weights. A change of either sign may be sure for this text and "
        "still be luck of that perturbation, above all one as small as bf16's.",
        "A run is one checkpoint of one seed: the intervals are about text, not about training again.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _image(figures: Mapping[str, str], name: str, caption: str) -> str:
    return f"![{caption}]({figures[name]})"


def _details(title: str, content: str) -> str:
    """Folded away; what is in it is Markdown still."""
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{content}\n\n</details>'
