"""One engine in a process of its own, under whatever Python has it installed: commands come as JSON lines, and so do
answers.

    PYTHON worker.py NAME

Uses the standard library alone, since the interpreter may have nothing of nemo_engine. What an engine prints goes to
stderr. Commands: {"do": "start", "model": DIR, "options": {...}}, {"do": "generate", "prompts": [[id, ...], ...],
"max_tokens": [n, ...], "keep": false}, {"do": "stop"}. Each is answered by one line: {"ok": true, ...} or {"ok": false,
"error": "..."}.

NAME is a file here with a class ``Peer(model, **options)``: ``versions()``, ``generate(prompts, max_tokens)``,
``close()``; and, if it has something to do there, ``prepare(prompts, max_tokens)`` before the clock starts (what is
made once in a server's life), and ``forget()`` after it has stopped, unless the command says "keep": empty the prefix
cache.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO


def serve(name: str, commands: TextIO, answers: TextIO) -> None:
    """Answer commands until "stop" or the end of input."""
    sys.path.insert(0, str(Path(__file__).parent))
    engine: Any = None
    for line in commands:
        command = json.loads(line)
        answer: dict[str, Any] = {"ok": True}
        try:
            if command["do"] == "start":
                began = time.perf_counter()
                module = importlib.import_module(name)
                imported = time.perf_counter()
                engine = module.Peer(command["model"], **command["options"])
                answer |= {
                    "versions": engine.versions(),
                    "import_seconds": imported - began,
                    "load_seconds": time.perf_counter() - imported,
                }
            elif command["do"] == "generate":
                prompts, max_tokens = command["prompts"], command["max_tokens"]
                if hasattr(engine, "prepare"):
                    engine.prepare(prompts, max_tokens)
                began = time.perf_counter()
                outputs = engine.generate(prompts, max_tokens)
                answer |= {"seconds": time.perf_counter() - began, "outputs": outputs}
                if not command.get("keep") and hasattr(engine, "forget"):
                    engine.forget()
            else:
                if engine is not None:
                    engine.close()
                return
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints must not get between the answers
    serve(sys.argv[1], sys.stdin, channel)
