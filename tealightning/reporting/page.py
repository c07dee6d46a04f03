"""A stand-alone HTML page of tables and plots: it loads nothing from elsewhere."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from tealightning.reporting.tables import Table


@dataclass(kw_only=True, slots=True)
class Plot:
    """A figure, the name of its files, a caption, and what stands in for it where it cannot be seen."""

    name: str
    figure: Figure
    caption: str
    alt: str


@dataclass(kw_only=True, slots=True)
class Box:
    """A framed note above the sections."""

    title: str
    lead: str = ""  # a first sentence, in bold
    text: str = ""
    bullets: Sequence[str] = ()
    warning: bool = False


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of the page with a link in its contents; what is empty is left out."""

    key: str
    title: str
    text: str = ""
    bullets: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    folded: Sequence[Table] = ()  # open on a click
    code: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    folded_code: tuple[str, str] | None = None  # title, text


def html_page(
    title: str,
    *,
    boxes: Sequence[Box],
    sections: Sequence[Section],
    images: Mapping[str, bytes],
    description: str = "",
    meta: str = "",
) -> str:
    """The page, with styles and pictures inside.

    Args:
        title: Heading and title.
        boxes: Framed notes, shown first.
        sections: Parts in order.
        images: Name of a plot -> its SVG.
        description: A sentence below the heading.
        meta: Small print below it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": _breakable, "unbroken": _unbroken}
    return environment.get_template("page.html.j2").render(
        title=title,
        boxes=boxes,
        sections=sections,
        images={name: f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for name, svg in images.items()},
        description=description,
        meta=meta,
    )


def _breakable(name: str) -> Markup:
    """Escaped text that may be broken after an underscore, where names are long."""
    return Markup(str(escape(name)).replace("_", "_<wbr>"))


def _unbroken(text: str) -> str:
    """The text with `n = 1` held together."""
    return text.replace(" = ", "\u00a0=\u00a0")
