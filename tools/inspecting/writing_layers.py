"""Sections about sites, activations and attention, and about what was logged."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tools.inspecting.activations import PLACES, Entropies, Layer, look_at_attention, look_at_outliers
from tools.inspecting.history import History, look_at_history
from tools.inspecting.sites import SiteLook, bent, facts, look_at_sites
from tools.inspecting.written import Inspected, Written, of_runs, picture
from tools.tables import folded, middle, number, share, table

_ALPHAS = ("alpha", "inverse_std")


def alpha(runs: Sequence[Inspected]) -> Written:
    """Alpha against 1/std of its input, at the checkpoint and over time."""
    from tools.inspecting import pictures_sites

    looks: list[tuple[str, list[SiteLook]]] = of_runs(runs, look_at_sites)
    text = [
        "In trained DyT models alpha follows the inverse deviation of its input (arXiv 2503.10622, section 7). "
        "Of a norm there is the alpha of the DyT that comes nearest to it (next section): where it lies on the dashed "
        "line, a DyT that starts at 1/std starts at what the norm did. The deviation is over all features and tokens "
        "of held-out text.",
    ]
    written = Written("", results=[[facts(look) for look in of] for _, of in looks])
    if any(math.isfinite(bent(look)) for _, of in looks for look in of):
        written.figures["alpha"] = pictures_sites.alphas(looks)
        text.append(picture("Alpha of every site against 1/std of its input, and their product by block", "alpha"))
    else:
        text.append("No site has an alpha, and no norm bends: there is nothing to draw.")
    for number_, run in enumerate(runs):
        history: History = run.found[look_at_history]
        if "alpha" in history:
            name = f"alpha-over-time-{number_ + 1}"
            written.figures[name] = pictures_sites.alphas_over_time(history)
            text.append(picture(f"{run.label}: alpha and 1/std of its input while it was trained", name))
    rows = [
        [label, look.name, look.function, number(bent(look)), number(_inverse(look)), number(bent(look) * look.std)]
        for label, of in looks
        for look in of
    ]
    head = ["run", "site", "function", "alpha", "1/std", "alpha × std"]
    text.append(folded("Every site", table(head, rows)))
    for _, of in looks:
        own = [bent(look) * look.std for look in of if look.alpha is not None]
        nearest = [bent(look) * look.std for look in of if look.alpha is None]
        told = [f"alpha × std {number(middle(own))} (median of {len(own)} sites)"] if own else []
        told += (
            [f"nearest DyT's alpha × std {number(middle(nearest))} (median of {len(nearest)} norms)"] if nearest else []
        )
        written.lines.append(", ".join(told) or "no sites")
    written.text = "\n\n".join(text)
    return written


def _inverse(look: SiteLook) -> float:
    return 1 / look.std if look.std > 0 else math.nan


def scatter(runs: Sequence[Inspected]) -> Written:
    """Input and output of every site beside the DyT nearest to it."""
    from tools.inspecting import pictures_sites

    looks: list[tuple[str, list[SiteLook]]] = of_runs(runs, look_at_sites)
    text = [
        "Of a norm, elements of its input against its output divided by gain: 1,500 drawn at random and the 64 "
        "largest. Each token has its own line through 0, and where tokens with large elements have flat ones the cloud "
        "bends like an S. The black curve is `scale · tanh(alpha · x)`, least squares over 16,384 elements drawn at "
        "random; its R² says how much of the norm an elementwise function can be, and the R² of the best straight line "
        "how much of that needs no bend. Where nothing bends there is no alpha. Of an elementwise function, the "
        "function, and a histogram of where its inputs fall; saturated is the share beyond 95 % of its range, where "
        "tanh passes less than a tenth of a gradient.",
    ]
    written = Written("")
    if any(of for _, of in looks):
        written.figures["scatter"] = pictures_sites.curves(looks)
        text.append(picture("Input and output of sites of the first, middle and last block, and outside", "scatter"))
    rows = []
    for label, of in looks:
        for look in of:
            fit = look.fit
            fitted = ["–"] * 4 if fit is None else [number(value) for value in fit]
            rows.append([label, look.name, look.function, number(look.std), *fitted, share(look.saturated)])
        r2 = [look.fit.r2 for look in of if look.fit is not None]
        saturated = [look.saturated for look in of if look.saturated is not None]
        told = [f"nearest DyT explains R² {number(middle(r2))} of a norm (median of {len(r2)})"] if r2 else []
        told += [f"saturated {share(middle(saturated))} (median), {share(max(saturated))} (most)"] if saturated else []
        written.lines.append(", ".join(told) or "no sites")
        written.results.append([facts(look) for look in of])
    head = ["run", "site", "function", "input std", "nearest DyT alpha", "scale", "R²", "R² of a line", "saturated"]
    text.append(folded("Every site", table(head, rows)))
    written.text = "\n\n".join(text)
    return written


def outliers(runs: Sequence[Inspected]) -> Written:
    """Large activations, layer by layer."""
    from tools.inspecting import pictures_layers

    found: list[tuple[str, tuple[int, list[Layer]]]] = of_runs(runs, look_at_outliers)
    layers = [(label, of) for label, (_, of) in found]
    text = [
        f"Over {', '.join(f'{tokens:,}' for tokens in dict.fromkeys(tokens for _, (tokens, _) in found))} tokens of "
        "held-out text: features with a magnitude above 6 somewhere (the outliers of LLM.int8(), arXiv 2208.07339, "
        "which also asks in how many layers and tokens), the kurtosis over features and tokens, and the largest "
        "magnitude over the median one. The last two do not change with the scale; the first does, and compares where "
        "a norm fixes the scale.",
        picture("Outliers by layer: in the residual stream and in what linears read", "outliers"),
    ]
    rows = [
        [
            label,
            PLACES[one.place],
            str(one.depth),
            f"{one.over:.0f} of {one.features}",
            number(one.kurtosis),
            number(one.ratio),
        ]
        for label, of in layers
        for one in of
    ]
    head = ["run", "place", "block", "features above 6", "kurtosis", "largest / median"]
    text.append(folded("Every layer", table(head, rows)))
    lines = []
    for _, of in layers:
        stream = [one for one in of if one.place == "stream"]
        lines.append(
            f"stream: at most {max(one.over for one in stream):.0f} of {stream[0].features} features above 6, "
            f"kurtosis {number(max(one.kurtosis for one in stream))}, largest/median "
            f"{number(max(one.ratio for one in stream))}"
        )
    return Written("\n\n".join(text), {"outliers": pictures_layers.outliers(layers)}, [of for _, of in layers], lines)


def entropy(runs: Sequence[Inspected]) -> Written:
    """How spread out each head's attention is."""
    from tools.inspecting import pictures_layers

    found: list[tuple[str, Entropies]] = of_runs(runs, look_at_attention)
    text = [
        "The mean entropy of a head's attention over held-out text, as a share of the logarithm of how many keys each "
        "query sees: 1 looks at all of them alike, 0 at one alone. Heads that fall towards 0 together announce "
        "instability (arXiv 2303.06296); single ones are ordinary.",
        picture("Attention entropy by block, relative to that of uniform attention", "entropy"),
    ]
    rows = [
        [label, str(block), *(f"{f(values):.3f}" for f in (min, middle, max)), number(nats)]
        for label, of in found
        for block, (values, nats) in enumerate(zip(of.share.tolist(), of.nats.nanmean(1).tolist(), strict=True))
    ]
    head = ["run", "block", "least head", "median", "greatest", "mean, nats"]
    text.append(folded("Every block", table(head, rows)))
    lines = [
        f"share of uniform attention's: {number(of.share.nanmean().item())} on average, "
        f"{number(of.share.min().item())} in the most concentrated head"
        for _, of in found
    ]
    return Written("\n\n".join(text), {"entropy": pictures_layers.entropies(found)}, [of for _, of in found], lines)


def history(runs: Sequence[Inspected]) -> Written:
    """What was logged of the inside while the run was trained."""
    from tools.inspecting import pictures_layers

    found: list[tuple[str, History]] = of_runs(runs, look_at_history)
    metrics = list(dict.fromkeys(metric for _, of in found for metric in of if metric not in _ALPHAS))
    results = [
        {metric: {name: line[-1][1] for name, line in names.items()} for metric, names in of.items()} for _, of in found
    ]
    lacking = [label for label, of in found if not set(of) - {*_ALPHAS}]
    text = []
    if metrics:
        text += [
            "What training recorded: each module's or weight's value a thin line, their median a thick one. The noise "
            "scale is the quotient of averages over the last ten records.",
            picture("Statistics that were recorded during training", "history"),
        ]
    if lacking:
        text.append(
            f"Of {', '.join(lacking)} nothing was recorded but alphas: `--log.inspect_every 100` records "
            "update-to-weight ratios, gradient tails, outliers and entropies every 100 steps while a run trains."
        )
    figures = {"history": pictures_layers.over_time(found, metrics)} if metrics else {}
    lines = [
        ", ".join(
            f"{metric} {number(middle(list(values.values())))}" for metric, values in of.items() if metric in metrics
        )
        or "nothing was recorded (--log.inspect_every)"
        for of in results
    ]
    return Written("\n\n".join(text), figures, results, lines)
