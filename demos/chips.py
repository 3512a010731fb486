"""Chips: the words of the prompt as buttons. They are a view of the controls: what a click changes is their text."""

from html import escape
from typing import Any

from attnctl.app.clicks import meant, said_of
from attnctl.app.drawing import content_words
from attnctl.words.spelling import WORD, words


def chips(prompt: str, controls: str) -> str:
    """The chips, as HTML."""
    subjects, bonds = said_of(controls)
    parts, before, link = [], 0, ""
    kept = set(content_words(prompt))
    for match, phrase in zip(WORD.finditer(prompt), words(prompt), strict=True):
        between = prompt[before : match.start()]
        before = match.end()
        if phrase not in kept:
            parts.append(f"<span>{escape(match[0])}</span>")
            link = ""
            continue
        if link and not between.strip():
            pair = f"{link} {match[0]}".lower()
            on, sign = pair in bonds, "&#8210;" if pair not in bonds else "&#9901;"
            parts.append(_button("link", pair, on, sign, f"{pair}: {'bound together' if on else 'bind together'}"))
        on = meant(phrase, bonds) in subjects
        parts.append(_button("word", phrase, on, escape(match[0]), ""))
        link = match[0]
    return " ".join(parts) or "<span>The words of your prompt appear here.</span>"


def _button(kind: str, what: str, on: bool, shows: str, title: str) -> str:
    named = f' title="{escape(title)}" aria-label="{escape(title)}"' if title else ""
    pressed = f'aria-pressed="{str(on).lower()}"'
    return f'<button class="{kind}" data-k="{kind} {escape(what)}" {pressed}{named}>{shows}</button>'


SHOWS: dict[str, Any] = {
    "html_template": "${value}",
    "js_on_load": """
        element.addEventListener("click", event => {
            const button = event.target.closest("button");
            if (button) { element.last = button.dataset.k; trigger("select", {value: button.dataset.k}); }
        });
        watch("value", () => {  // the one who uses the keyboard stays where they were
            const buttons = [...element.querySelectorAll("button")];
            if (document.activeElement === document.body)
                buttons.find(one => one.dataset.k === element.last)?.focus({preventScroll: true});
        });
    """,
}
"""How a field of buttons is shown: a click on one is a `select` event with its key."""
