"""A report in a folder: Markdown with its figures beside it, the same as one HTML page that needs nothing else, and its
results as JSON."""

from __future__ import annotations

import html
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from pretrain.files import write_atomically

_NEEDED = ("matplotlib", "scipy", "markdown")  # for the figures, their intervals and fits, and the page
FIGURES = "figures"  # the folder beside report.md, of NAME.svg
_DRAWN = "figures.json"  # beside report.md: the names of its figures
_IMAGE = re.compile(r'<p><img alt="([^"]*)" src="figures/([^"]+)\.svg" ?/?></p>')
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1, h2 {{ line-height: 1.2 }}
h2 {{ margin-top: 2.2rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
table {{ font-size: 14px; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap }}
th {{ white-space: normal }}
pre {{ background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: 13px }}
figure {{ margin: 1rem 0 }}
figure svg {{ max-width: 100%; height: auto }}
figcaption {{ color: #555; font-size: 13px }}
summary {{ cursor: pointer }}
#cautions + ul {{ border-left: 4px solid #d55e00; background: #fdf3ec; margin: 0; padding: .6rem .6rem .6rem 2rem }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def check_packages(what: str = "the report") -> None:
    """ConfigError if one that a report takes is not here: before the first run or forward, not after the last."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{what} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def make_folder(folder: Path) -> None:
    """For ``write_report``, before there is anything to lose. ConfigError if it cannot be made."""
    try:
        (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write the report to {folder}: {error.strerror}") from None


def write_report(folder: Path, title: str, text: str, figures: Mapping[str, str], results: Any) -> None:
    """Write report.md (``text``), report.html, ``figures`` (SVG by name) and results.json; what an earlier report there
    showed and this one does not goes."""
    found = json.dumps(results, indent=2, allow_nan=False)
    make_folder(folder)
    try:
        for name, svg in figures.items():
            write_atomically(folder / FIGURES / f"{name}.svg", svg.encode())
        write_atomically(folder / "report.md", text.encode())
        write_atomically(folder / "report.html", page(title, text, figures).encode())
        write_atomically(folder / "results.json", found.encode() + b"\n")
        _clear(folder, list(figures))
    except OSError as error:
        raise ConfigError(f"cannot write the report to {folder}: {error.strerror}") from None


def _clear(folder: Path, drawn: list[str]) -> None:
    """Take away what an earlier report drew and this one did not; other people's figures stay."""
    record = folder / _DRAWN
    for name in json.loads(record.read_text(encoding="utf-8")) if record.exists() else ():
        if name not in drawn:
            (folder / FIGURES / f"{name}.svg").unlink(missing_ok=True)
    write_atomically(record, json.dumps(drawn).encode())


def page(title: str, markdown_text: str, figures: Mapping[str, str]) -> str:
    """``markdown_text`` with the SVGs of ``figures`` where it has figures/NAME.svg: one file, nothing to load."""
    import markdown

    body = markdown.markdown(markdown_text, extensions=["tables", "fenced_code", "md_in_html", "toc"])

    def inline(found: re.Match[str]) -> str:
        caption, name = found.groups()
        return f'<figure role="img" aria-label="{caption}">{figures[name]}<figcaption>{caption}</figcaption></figure>'

    return _PAGE.format(title=html.escape(title), body=_IMAGE.sub(inline, body))
