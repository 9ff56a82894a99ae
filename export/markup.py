"""HTML and SVG out of function calls. What is not markup is escaped, so that no text can be forgotten."""

import html

VOID = {"meta", "br"}  # of those used here: HTML knows no end tag for them


class Markup(str):
    """Text that is HTML already. Every other string is text."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """`<name attribute="…">children</name>`.

    `stroke_width=1` becomes `stroke-width="1"`, a trailing underscore (`class_`) is dropped, and so is an
    attribute of None. Floats are written to a tenth, which is enough for pixels.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        words.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(text)}"')
    opened = f"<{' '.join(words)}>"
    return Markup(opened if name in VOID else f"{opened}{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """The children one after the other, those that are not markup escaped."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))
