"""Invented sentences, and a text that is hostile to HTML and holds an escape and a bidirectional override."""

import numpy as np

HOSTILE = (
    '</script></div><script>alert("hostile")</script><img src="http://example.org/x.png" onerror=alert(1)> & so on'
    " \x1b[31m \u202egnp.exe"
)
HOSTILE_SHOWN = HOSTILE.replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")  # in the pages
PROSE = "the ships of our navy sailed in the spring and came home with the trade of many lands before winter fell"


def prose(seed: int, count: int = 8) -> str:
    """Invented sentences, different for each seed."""
    generator = np.random.default_rng(seed)
    return " ".join(" ".join(generator.choice(PROSE.split(), 9)).capitalize() + "." for _ in range(count))
