"""Sections about weights: their gradients, their singular values, and what scaling them does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tools.inspecting.gradients import Gradients, look_at_gradients
from tools.inspecting.invariance import FACTORS, Invariances, look_at_invariance
from tools.inspecting.spectra import Spectra, look_at_spectra
from tools.inspecting.written import Inspected, Written, of_runs, picture
from tools.tables import folded, middle, number, table

_HELD = 1e-4  # nats per token: what fp32 rounding may do to a mean loss, with room to spare


def gradients(runs: Sequence[Inspected]) -> Written:
    """How heavy the tails of each weight's gradient are."""
    from tools.inspecting import pictures_weights

    found: list[tuple[str, Gradients]] = of_runs(runs, look_at_gradients)
    text = [
        f"The gradient G of the training objective over {_tokens(found)} tokens of training text, weight by weight, in "
        "measures that do not change when all of it is multiplied by a constant. A histogram of |G| is none: of a "
        "gradient that a norm makes ten times smaller it is ten times narrower, with the same tail. The "
        "kurtosis E(g−m)⁴/σ⁴ is 3 for a Gaussian. q99.9/q50, the 99.9 % quantile of |G| over its median, is 4.9 for a "
        "Gaussian. The Hill index a, of the largest hundredth, stands for P(|g| > t) ~ t^−a: smaller is heavier. The "
        "noise is what the gradients of single sequences differ by from G (next section).",
        picture("Tails of each weight's gradient by kind of weight: a dot is a weight", "gradient-tails"),
        "The whole distribution, each weight's in units of its own root mean square; a line that falls later has a "
        "heavier tail, and straight lines are power laws.",
        picture("Share of gradient elements beyond so many RMS, by kind of weight", "gradient-survival"),
    ]
    rows = [
        [
            label,
            one.name,
            f"{one.rms:.2e}",
            *(number(v) for v in (one.kurtosis, one.ratio, one.hill, one.noise_kurtosis)),
        ]
        for label, of in found
        for one in of.weights
    ]
    medians = [
        [label, *(number(middle([getattr(one, key) for one in of.weights])) for key in _TAILS)] for label, of in found
    ]
    names = ["kurtosis", "q99.9/q50", "Hill index", "kurtosis of the noise"]
    text.append("Medians over the weights:\n\n" + table(["run", *names], medians))
    text.append(folded("Every weight", table(["run", "weight", "RMS", *names], rows)))
    figures = {"gradient-tails": pictures_weights.tails(found), "gradient-survival": pictures_weights.survival(found)}
    lines = [f"median weight: kurtosis {a}, q99.9/q50 {b}, Hill {c}, noise kurtosis {d}" for _, a, b, c, d in medians]
    return Written("\n\n".join(text), figures, [of.weights for _, of in found], lines)


_TAILS = ("kurtosis", "ratio", "hill", "noise_kurtosis")


def noise(runs: Sequence[Inspected]) -> Written:
    """What single sequences' gradients differ by from their mean, and the batch size that this suggests."""
    from tools.inspecting import pictures_weights

    found: list[tuple[str, Gradients]] = of_runs(runs, look_at_gradients)
    rows = []
    for run, (label, of) in zip(runs, found, strict=True):
        norms = sorted(of.norms)
        rows.append(
            [
                label,
                _with_error(of.noise.scale, of.noise.error),
                f"{run.facts['batch_tokens']:,}",
                number(math.sqrt(max(0.0, of.noise.gradient_squared))),
                number(math.sqrt(max(0.0, of.noise.trace))),
                number(norms[-1] / middle(norms)),
            ]
        )
    head = [
        "run",
        "noise scale, tokens",
        "the run's batch, tokens",
        "norm of the gradient",
        "of one sequence's noise",
        "largest / median noise",
    ]
    text = [
        "The simple noise scale tr(Σ)/|G|² (arXiv 1812.06162, appendix A.1) from the squared norms of single "
        f"sequences' gradients and of their mean over {_tokens(found)} tokens: a batch far below it averages too "
        "little, one far above it wastes tokens. ± is one standard error, by leaving out one sequence at a time. A "
        "dash means that so few sequences do not tell the gradient from its noise, ± ∞ that with one of them less they "
        "would not: take more `--sequences`.",
        table(head, rows),
        "The noise g_i − G of single sequences i, over all parameters. Heavy-tailed noise in the sense of "
        "arXiv 1912.03194 has a few sequences far to the right. "
        f"{min(len(of.norms) for _, of in found)} sequences see no further than the largest of as many.",
        picture("Norm of the noise of single sequences, in units of its median", "noise"),
    ]
    lines = [f"noise scale {row[1]} tokens, batch {row[2]}; largest/median noise {row[5]}" for row in rows]
    results = [{"noise": of.noise, "norms": of.norms} for _, of in found]
    return Written("\n\n".join(text), {"noise": pictures_weights.noise_norms(found)}, results, lines)


def _with_error(value: float, error: float) -> str:
    if math.isnan(value):
        return "–"
    if math.isinf(error):
        return f"{value:,.0f} ± ∞"
    return f"{value:,.0f}" + ("" if math.isnan(error) else f" ± {error:,.0f}")


def _tokens(found: Sequence[tuple[str, Gradients]]) -> str:
    return " and ".join(f"{tokens:,}" for tokens in dict.fromkeys(of.tokens for _, of in found))


def spectra(runs: Sequence[Inspected]) -> Written:
    """Singular values of every weight and of each head's W_q^T W_k."""
    from tools.inspecting import pictures_weights

    found: list[tuple[str, Spectra]] = of_runs(runs, look_at_spectra)
    normed = [label for label, of in found if of.normalized]
    about = (
        f" Of {', '.join(normed)} the scores pass query and key norms, so that the size of these weights does not "
        "reach them: only the shape of the spectrum does."
        if normed
        else ""
    )
    text = [
        "Singular values of every weight, in descending order. The stable rank |W|²_F / |W|²_2 says over how many "
        "directions a weight spreads; the condition is the largest value over the smallest.",
        picture("Singular values of each weight, by kind", "spectra"),
        "Attention scores are xᵀ W_qᵀ W_k x, between which RoPE turns where there is RoPE. Blow-up of the largest "
        "singular value of W_qᵀ W_k comes before collapsing entropy and diverging runs (arXiv 2505.21910). Heads share "
        f"the keys of their group. Gains of the norm before, and 1/√(head width), are not in it.{about}",
        picture("Largest singular value by block, and that of W_qᵀ W_k of each head", "spectral-norms"),
    ]
    rows = [
        [
            label,
            one.name,
            f"{one.shape[0]} × {one.shape[1]}",
            number(one.values[0].item()),
            f"{one.stable_rank:.1f} of {min(one.shape)}",
            number(one.condition),
        ]
        for label, of in found
        for one in of.weights
    ]
    head = ["run", "weight", "shape", "largest", "stable rank", "condition"]
    text.append(folded("Every weight", table(head, rows)))
    heads = [
        [label, str(one.block), str(place), number(values[0]), number(sum(v**2 for v in values) / values[0] ** 2)]
        for label, of in found
        for one in of.scores
        for place, values in enumerate(one.sigma.tolist())
    ]
    text.append(folded("W_qᵀ W_k of every head", table(["run", "block", "head", "largest", "stable rank"], heads)))
    figures = {"spectra": pictures_weights.spectra(found), "spectral-norms": pictures_weights.spectral_norms(found)}
    lines = []
    for _, of in found:
        largest = number(max(one.sigma[:, 0].max().item() for one in of.scores))
        behind = ", behind query and key norms" if of.normalized else ""
        spread = number(middle([one.stable_rank / min(one.shape) for one in of.weights]), 2)
        lines.append(f"W_qᵀ W_k at most {largest}{behind}; stable rank {spread} of full (median weight)")
    results = [
        {
            "weights": [
                one._asdict() | {"stable_rank": one.stable_rank, "condition": one.condition} for one in of.weights
            ],
            "scores": of.scores,
            "normalized": of.normalized,
        }
        for _, of in found
    ]
    return Written("\n\n".join(text), figures, results, lines)


def invariance(runs: Sequence[Inspected]) -> Written:
    """What scaling weights or the input does to the loss, beside what the plan promises."""
    from tools.inspecting import pictures_weights

    found: list[tuple[str, Invariances]] = of_runs(runs, look_at_invariance)
    text = [
        "The loss on held-out text after all weights of a kind, in all blocks (with their biases), are multiplied by a "
        "factor; `input` is what the embedding gives, positions included. Where the plan's norms take the factor out "
        "again before anything bends, the loss cannot change but by rounding and by the norms' epsilon, which shows "
        "where what they divide by is small: those kinds are marked as promised. Scaling such a weight is no more than "
        "a change of its learning rate.",
        picture("Change of the loss when a kind of weight is scaled", "invariance"),
    ]
    rows, lines = [], []
    for label, of in found:
        for row in of.rows:
            rises = [loss - of.loss for loss in row.losses]
            largest = max(map(abs, rises))
            kept = "" if not row.exact else "held" if largest < _HELD else f"up to {largest:.1e}: epsilon"
            rows.append(
                [label, row.kind, *(f"{rise:+.2e}" if abs(rise) < 1e-3 else f"{rise:+.4f}" for rise in rises), kept]
            )
        promised = {row.kind: max(abs(loss - of.loss) for loss in row.losses) for row in of.rows if row.exact}
        told = ", ".join(promised) or "nothing"
        worst = f"; largest change {max(promised.values()):.1e} nats" if promised else ""
        lines.append(f"does not depend on the size of: {told}{worst}")
    text.append(table(["run", "kind", *(f"× {factor:g}" for factor in FACTORS), "promised to be 0"], rows))
    results = [of._asdict() | {"factors": list(FACTORS)} for _, of in found]
    return Written("\n\n".join(text), {"invariance": pictures_weights.invariance(found)}, results, lines)
