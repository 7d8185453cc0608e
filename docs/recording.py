"""Record ``nemo-engine demo`` in a terminal, as docs/demo.svg: ``python docs/recording.py``.

A run on a quiet machine, as it was: each frame is what the screen showed at that time. Waiting for more than a second
is shown as one. Nothing in the picture is loaded from elsewhere, and whoever wants no motion sees its end.
"""

from __future__ import annotations

import os
import pty
import sys
import time
from html import escape
from pathlib import Path

import pyte

SVG = Path(__file__).parent / "demo.svg"
COMMAND = ["nemo-engine", "demo", "--max-tokens", "48"]
COLUMNS, LINES = 94, 18
WIDTH, HEIGHT, LEFT, TOP = 8.4, 18, 16, 28  # of a character, a line, and the margins, in pixels
INTERVAL, MAX_WAIT, AT_END = 0.1, 1.0, 6.0  # seconds: between frames, of one frame, of the last
MAX_FRAMES = 40


def record() -> list[tuple[float, list[str]]]:
    """Seconds from the start and the lines of the screen, each time that it has changed."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    screen.draw("$ " + " ".join(COMMAND))
    stream.feed(b"\r\n")
    frames = [(0.0, [line.rstrip() for line in screen.display])]
    start = time.monotonic()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1 << 16)
        stream.feed(data)
        now = time.monotonic() - start
        shown = [line.rstrip() for line in screen.display]
        # A frame in which lines are being drawn anew is over in a moment, and the next one replaces it.
        if now - frames[-1][0] < INTERVAL and len(frames) > 1:
            frames[-1] = (frames[-1][0], shown)
        elif shown != frames[-1][1]:
            frames.append((now, shown))
        return data

    os.environ |= {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm"}
    if pty.spawn([str(Path(sys.executable).with_name(COMMAND[0])), *COMMAND[1:]], read):
        raise RuntimeError(f"{' '.join(COMMAND)} failed")
    step = -(-len(frames) // MAX_FRAMES)
    return [*frames[:-1:step], frames[-1]]


def drawn(frames: list[tuple[float, list[str]]]) -> str:
    """The recording as SVG, each frame a group that is visible in its turn."""
    ends = [later for later, _ in frames[1:]] + [frames[-1][0] + AT_END]
    waits = [min(end - begin, MAX_WAIT) for (begin, _), end in zip(frames[:-1], ends)] + [AT_END]
    total, now = sum(waits), 0.0
    rules, groups = [], []
    for number, ((_, lines), wait) in enumerate(zip(frames, waits)):
        begin, end = now / total * 100, (now + wait) / total * 100
        now += wait
        hidden = f"0% {{ visibility: {'visible' if begin == 0 else 'hidden'} }}"
        rules.append(f"@keyframes f{number} {{ {hidden} {begin:.2f}% {{ visibility: visible }} "
                     f"{end:.2f}%, 100% {{ visibility: {'visible' if end > 99.99 else 'hidden'} }} }}")  # fmt: skip
        rules.append(f"#f{number} {{ animation: f{number} {total:.1f}s steps(1) infinite }}")
        texts = [
            f'<text y="{TOP + row * HEIGHT}" textLength="{len(line) * WIDTH:.1f}">{escape(line)}</text>'
            for row, line in enumerate(lines)
            if line
        ]
        groups.append(f'<g id="f{number}" class="frame">{"".join(texts)}</g>')
    size = f"{COLUMNS * WIDTH + 2 * LEFT:.0f} {LINES * HEIGHT + 24}"
    still = ".frame { animation: none !important } .frame:last-of-type { visibility: visible }"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img"'
    return "\n".join([
        f'{head} aria-label="nemo-engine demo in a terminal">',
        "<style>", "text { font: 14px ui-monospace, Menlo, Consolas, monospace; fill: #d8dee9; white-space: pre }",
        ".frame { visibility: hidden }", *rules, f"@media (prefers-reduced-motion) {{ {still} }}", "</style>",
        '<rect width="100%" height="100%" rx="8" fill="#1b1f27"/>',
        f'<g transform="translate({LEFT} 0)">', *groups, "</g>", "</svg>", "",
    ])  # fmt: skip


if __name__ == "__main__":
    SVG.write_text(drawn(record()))
    print(f"{SVG.name}: {SVG.stat().st_size} bytes")
