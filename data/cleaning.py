"""Cleaning captions as open_clip does for its CLIP tokenizer, without the steps that cannot change a given text.

open_clip calls ftfy and then `html.unescape` twice. ftfy goes through ten steps, again and again until nothing changes
any more. Most steps act on certain characters only; which these are is found by asking the steps themselves.
"""

from __future__ import annotations

import html
import re
import unicodedata

import ftfy
from ftfy import fixes
from ftfy.badness import is_bad

# Printable ASCII but "&", tabs and line feeds: no step changes more of these than case and white space.
CLEAN = re.compile(r"[\t\n -%'-~]*")

# What ftfy does to characters, by default and in this order, after it has repaired entities and encodings.
FIXERS = (
    fixes.fix_c1_controls,
    fixes.fix_latin_ligatures,
    fixes.fix_character_width,
    fixes.uncurl_quotes,
    fixes.fix_line_breaks,
    fixes.fix_surrogates,
    fixes.remove_terminal_escapes,
    fixes.remove_control_chars,
)
LONGEST = ftfy.TextFixerConfig().max_decode_length
KEPT_CHARACTERS = 50_000  # about 5 MB


class _Touched(dict):
    """Whether any of the fixers acts on a character.

    Those that look for sequences (terminal escapes, carriage return and line feed, pairs of surrogates) look for ones
    that begin with a character which is changed when it stands alone.
    """

    def __missing__(self, char: str) -> bool:
        if len(self) >= KEPT_CHARACTERS:
            self.clear()
        found = self[char] = any(fixer(char) != char for fixer in FIXERS)
        return found


_TOUCHED = _Touched()


def clean_text(text: str) -> str:
    """What open_clip's cleaning "lower" gives: repaired, unescaped, of single spaces and in lower case.

    Example:
        >>> clean_text("  The  cafÃ© &amp; the ﬁsh ")
        'the café & the fish'
    """
    if CLEAN.fullmatch(text):
        return " ".join(text.split()).lower()
    if len(text) > LONGEST:
        fixed = ftfy.fix_text(text)
    elif "\n" in text:  # ftfy repairs each line for itself
        fixed = "\n".join(map(fix_line, text.split("\n")))
    else:
        fixed = fix_line(text)
    if "&" in fixed:
        fixed = html.unescape(html.unescape(fixed))
    return " ".join(fixed.split()).lower()


def fix_line(text: str) -> str:
    """What `ftfy.fix_text` gives for a text without line feeds."""
    escaped = "<" not in text  # what may be HTML is left as it is
    while True:
        before = text
        if escaped and "&" in text:
            text = fixes.unescape_html(text)
        if not text.isascii() and is_bad(text):
            text = ftfy.fix_encoding(text)
        if any(map(_TOUCHED.__getitem__, set(text))):
            for fixer in FIXERS:
                text = fixer(text)
        text = unicodedata.normalize("NFC", text)
        if text == before:
            return text
