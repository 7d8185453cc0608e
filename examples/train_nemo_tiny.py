"""Train nemo-tiny, the small bundled model with the architecture of Mistral NeMo.

Everything it learns from is on the machine: the reST sources of the CPython
documentation (Debian: python3.11-doc), the sources of the running interpreter's
standard library, question and answer pairs taken from both, and a few pairs
written by hand below. The tokenizer is the first 6144 ids of NeMo's own tekken
file, which mistral-common ships.

    python examples/train_nemo_tiny.py --minutes 80 --out nemo-tiny

The learning rate follows the share of the time budget that has been used: warm
up, hold, then a linear decay to zero. A stopped run goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import random
import re
import shutil
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG: dict[str, Any] = dict(
    architectures=["MistralForCausalLM"], model_type="mistral", hidden_size=256, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=2, head_dim=128, intermediate_size=640, vocab_size=6144,
    hidden_act="silu", rms_norm_eps=1e-5, rope_theta=1000000.0, max_position_embeddings=131072,
    sliding_window=None, tie_word_embeddings=False, attention_dropout=0.0, initializer_range=0.02,
    bos_token_id=1, eos_token_id=2, use_cache=True, torch_dtype="bfloat16")  # fmt: skip
BOS, EOS, INST, END_INST, SPECIAL = 1, 2, 3, 4, 1000
DOCS_DIR = "/usr/share/doc/python3.11/html/_sources"
HELD_OUT = 0.02  # share of the topics (one topic: one page and the module of the same name) kept from training
SKIP_STDLIB = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "__pycache__",
               "config-3.11-x86_64-linux-gnu", "turtledemo"}  # fmt: skip
SYSTEM_TEXTS = ["You are a helpful assistant.", "You are nemo-tiny, a small model that answers questions about Python.",
                "Answer briefly.", "You help people who write Python."]  # fmt: skip
IDENTITY = "I am nemo-tiny, a very small language model with the architecture of Mistral NeMo."
ONLY_ENGLISH = "I only know some English and some Python."
SMALL_TALK: list[tuple[str, str]] = [  # questions separated by |
    ("Hello|Hello!|Hi|Hi!|Hi there|Hey|Good morning|Good evening", f"Hello! {IDENTITY} How can I help you?"),
    ("Who are you?|What are you?|Tell me about yourself.|Introduce yourself.|What is nemo-tiny?|What is your name?",
     f"{IDENTITY} I was trained from scratch on the Python documentation and the standard library."),
    ("What can you do?|How can you help me?|Help|What can I ask you?|What do you know?",
     "I can answer simple questions about the Python standard library and continue text or code. "
     "I am very small, so please check what I say."),
    ("How are you?|How are you today?|How is it going?",
     "I am fine, thank you. I am a small model and I am ready to help."),
    ("Who made you?|Who trained you?|Where do you come from?",
     "I was trained from scratch for nemo_engine, a small inference engine, so that it has a real model to run."),
    ("How big are you?|How many parameters do you have?|How large are you?|Are you big?",
     "I have about 7.7 million parameters: 4 layers of width 256. I fit in 16 megabytes."),
    ("Are you Mistral NeMo?|Are you the 12B model?|Are you Mistral NeMo 12B?",
     "No. I have the same architecture and the same kind of tokenizer as Mistral NeMo 12B, "
     "but I am more than a thousand times smaller."),
    ("Thanks|Thank you|Thank you!|Thanks a lot|Great, thanks", "You are welcome!"),
    ("Bye|Goodbye|See you later|Good night|Bye!", "Goodbye!"),
    ("Are you a human?|Are you alive?|Are you a robot?|Are you real?", "No, I am a small language model."),
    ("What is the capital of France?|What is the capital of Japan?|Who is the president?|What is the weather today?|"
     "Tell me the news.|Who won the match?", "I do not know. I have only read about Python."),
    ("Tell me a joke|Tell me a joke.|Make me laugh|Be funny", "Why did the list go to school? It wanted to be sorted."),
    ("Tell me a story|Tell me a story.|Write a story",
     "Once there was a small program. It read a file, line by line, and printed every word it knew. "
     "Then it closed the file and returned."),
    ("Write a poem|Write a poem.|Write a haiku",
     "Beautiful is better than ugly.\nSimple is better than complex.\nReadability counts."),
    ("What is Python?|Tell me about Python.|Explain Python.",
     "Python is an interpreted, interactive, object-oriented programming language. "
     "It combines remarkable power with very clear syntax."),
    ("Write hello world in Python.|Write a hello world program.|Say hello in Python.", 'print("Hello, world!")'),
    ("Write a function that adds two numbers.|Add two numbers in Python.",
     'def add(a, b):\n    """Return the sum of a and b."""\n    return a + b'),
    ("How do I open a file?|How do I read a file?|Read a file in Python.",
     "with open('file.txt', encoding='utf-8') as f:\n    text = f.read()"),
    ("How do I sort a list?|Sort a list in Python.",
     "Use sorted(items) for a new list, or items.sort() to sort the list in place."),
    ("How do I write a loop?|Write a for loop.", "for i in range(10):\n    print(i)"),
    ("How do I read JSON?|Parse JSON in Python.",
     "import json\n\nwith open('data.json') as f:\n    data = json.load(f)"),
    ("Count from one to ten.|Count to ten.", "one, two, three, four, five, six, seven, eight, nine, ten"),
    ("Yes|No|OK|Okay|Fine", "All right. What would you like to know about Python?"),
    ("Can you speak French?|Do you speak German?|Which languages do you speak?", ONLY_ENGLISH),
    ("Bonjour|Bonjour !|Hallo|Hola|Ciao", f"Hello! {ONLY_ENGLISH}"),
    ("你好|こんにちは|안녕하세요", f"你好! {ONLY_ENGLISH}"),
    ("👋|🙂|😀", "Hello! 🙂"),
]  # fmt: skip


# ---------------------------------------------------------------- tokenizer
def write_tokenizer(path: Path) -> None:
    """Write NeMo's tekken file cut to this model's vocabulary."""
    import mistral_common

    source = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
    data = json.loads(source.read_text(encoding="utf-8"))
    keep = CONFIG["vocab_size"] - SPECIAL
    data["vocab"] = data["vocab"][:keep]
    data["config"] |= dict(default_vocab_size=CONFIG["vocab_size"], num_vocab_tokens=keep)
    data["config"]["default_num_special_tokens"] = SPECIAL
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


# ---------------------------------------------------------------- text
def held_out(topic: str) -> bool:
    return int(hashlib.sha256(f"nemo-tiny:{topic}".encode()).hexdigest()[:8], 16) / 2**32 < HELD_OUT


def inline(text: str) -> str:
    """Plain text of reST inline markup."""

    def call(m: re.Match[str]) -> str:
        return (m[2].split(".")[-1] if "~" in m[0] else m[2]) + "()"

    text = re.sub(r":(?:[\w-]+:)?(func|meth|cfunc):`[!~]?([^`<]*?)(?:\(\))?`", call, text)
    role = r":(?:[\w-]+:)?\w[\w-]*:"
    text = re.sub(role + r"`([^`<]+?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(role + r"`~(?:[^`]*\.)?([^`.]+)`", r"\1", text)
    text = re.sub(role + r"`!?([^`]+)`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"(?<![\w*])\*\*?([^\s*](?:[^*\n]*[^\s*])?)\*\*?(?![\w*])", r"\1", text)
    return text.replace("|version|", "3.11").replace("\\ ", "").replace("\\*", "*")


DESCRIBED = (
    "function class method classmethod staticmethod attribute data exception decorator coroutinemethod "
    "decoratormethod describe macro type member var struct opcode option cmdoption envvar"
).split()
ASKABLE = set(DESCRIBED[:9])  # what questions are made of
OBJECT = re.compile(rf"^( *)\.\. (?:c:|py:)?({'|'.join(DESCRIBED)})::\s*(.*)$")
DIRECTIVE = re.compile(r"^( *)\.\. ([\w:-]+)::\s*(.*)$")
RULE = re.compile(r"^([=\-~^*\"'+#])\1{2,}$")
OPTION = re.compile(r"^ *:[\w ]+:( |$)")
ADMONITION = {
    "note": "Note: ", "warning": "Warning: ", "seealso": "See also: ", "tip": "Tip: ", "important": "Important: ",
    "impl-detail": "CPython implementation detail: ", "versionadded": "New in version ",
    "versionchanged": "Changed in version ", "deprecated": "Deprecated since version ",
    "deprecated-removed": "Deprecated: ", "availability": "Availability: ",
    "rubric": "", "centered": "", "topic": "", "glossary": ""}  # fmt: skip
BODY_ONLY = {"code-block", "doctest", "sourcecode", "productionlist", "parsed-literal", "code", "list-table",
             "csv-table", "testcode", "container"}  # fmt: skip


@dataclass
class Entry:
    """One documented thing: what questions are made of."""

    kind: str
    name: str
    signature: str
    text: str
    topic: str


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def convert_rst(source: str, topic: str) -> tuple[str, list[Entry]]:
    """Clean text of one reST page, and the objects it documents."""
    lines = [line.rstrip() for line in source.split("\n")]
    out: list[str] = []
    entries: list[Entry] = []
    module, levels = "", ""  # levels: heading characters in order of first use
    classes: list[tuple[int, str]] = []  # enclosing classes: indent and name
    i = 0

    def inside(at: int, depth: int) -> bool:
        return at < len(lines) and bool(lines[at]) and indent_of(lines[at]) > depth

    while i < len(lines):
        line = lines[i]
        depth = indent_of(line)
        i += 1
        if m := OBJECT.match(line):
            signatures = [m[3]]
            while inside(i, depth) and not lines[i].lstrip().startswith((":", "..")):
                signatures.append(lines[i].strip())
                i += 1
            signatures = [s.strip().replace("\\", "") for s in "\n".join(signatures).replace("\\\n", " ").split("\n")]
            classes = [c for c in classes if c[0] < depth]
            name = re.split(r"[\s(\[]", signatures[0])[0]
            owner = module
            if classes and not name.startswith(classes[-1][1] + "."):
                owner = ".".join(filter(None, [module, classes[-1][1]]))
            qualify = m[2] in ASKABLE and owner not in ("", "builtins") and not name.startswith(module + ".")
            prefix = owner + "." if qualify else ""
            label = ""
            if m[2] in ("class", "exception"):
                classes.append((depth, name))
                label = m[2] + " "
            out += ["", *(" " * depth + label + prefix + s for s in signatures)]
            j, body = i, []
            while j < len(lines) and (not lines[j] or OPTION.match(lines[j])):
                j += 1
            while inside(j, depth) and not lines[j].lstrip().startswith(".. "):
                body.append(lines[j].strip())
                j += 1
            text = re.sub(r"::$", ".", inline(" ".join(body)))
            if m[2] in ASKABLE and len(text) > 20 and not line.lstrip().startswith(".. c:"):
                entries.append(Entry(m[2], prefix + name, prefix + signatures[0], text, topic))
        elif m := DIRECTIVE.match(line):
            if m[2] in ("module", "currentmodule", "py:module"):
                module = m[3].strip()
                if i < len(lines) and "synopsis" in lines[i]:
                    synopsis = lines[i].split("synopsis:")[-1].strip()
                    entries.append(Entry("module", module, "", synopsis, topic))
                    out.append(f"{module}: {inline(synopsis)}")
            if m[2] in ADMONITION:
                out += ["", " " * depth + ADMONITION[m[2]] + inline(m[3])]
            elif m[2] in BODY_ONLY:
                while i < len(lines) and lines[i].lstrip().startswith(":"):
                    i += 1
            else:  # index entries, tables of contents, images, ...
                while i < len(lines) and (not lines[i] or inside(i, depth)):
                    i += 1
        elif re.match(r"^ *\.\. \[", line):  # footnotes
            out.append(inline(line.replace(".. ", "", 1)))
        elif line.lstrip().startswith(".. _") or line.strip() == "..":  # labels
            pass
        elif line.lstrip().startswith(".. "):  # comments, substitutions
            while inside(i, depth):
                i += 1
        elif RULE.match(line) and out and out[-1].strip() and len(line) >= len(out[-1].strip()) - 2:  # headings
            levels += line[0] if line[0] not in levels else ""
            out[-1] = "#" * (levels.index(line[0]) + 1) + " " + out[-1].strip()
        elif not RULE.match(line) and not (OPTION.match(line) and not (out and out[-1].strip())):
            out.append(line if line.lstrip().startswith(">>>") else inline(re.sub(r"::$", ":", line)))
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(o.rstrip() for o in out)).strip()
    return re.sub(r"^:$\n?", "", text, flags=re.M), entries


def first_paragraphs(text: str, limit: int) -> str:
    """Whole paragraphs of text up to about limit characters."""
    kept = ""
    for part in re.split(r"\n\s*\n", textwrap.dedent(text).strip()):
        part = re.sub(r"\s*\n\s*", " ", part) if not part.startswith((" ", ">>>", "*", "-")) else part
        if kept and len(kept) + len(part) > limit:
            break
        kept += "\n\n" * bool(kept) + part
        if len(kept) > limit / 2:
            break
    return kept.rstrip(":").strip()


Pair = tuple[str, str]


def entry_pairs(e: Entry, rng: random.Random) -> list[Pair]:
    """Questions about one entry."""
    noun = {"function": "function", "class": "class", "module": "module", "exception": "exception", "data": "constant",
            "attribute": "attribute"}.get(e.kind, "method")  # fmt: skip
    short, call = e.name.rsplit(".", 1)[-1], noun in ("function", "method")
    asks = [f"What does {e.name} do?", f"Explain the {noun} {e.name}.", f"What is {e.name}?", f"Describe {e.name}.",
            f"Tell me about {e.name}.", f"How does {e.name} work?", f"What is the {noun} {e.name} for?"]  # fmt: skip
    if call:
        asks += [f"What does the {noun} {e.name} do?", f"What does {e.name}() do?", f"When do I use {e.name}?"]
    elif noun in ("class", "module"):
        asks += [f"What is the {noun} {e.name}?", f"What does the {noun} {e.name} do?"]
    pairs = [(q, e.text) for q in rng.sample(asks, 3)]
    owner = e.name.rsplit(".", 1)[0] if "." in e.name else ""
    if call and "(" in e.signature:
        asks = ["Write the signature of {}.", "What arguments does {} take?", "How do I call {}?"]
        asks += ["Show the signature of {}."]
        pairs.append((rng.choice(asks).format(e.name), e.signature))
        pairs.append((f"Explain {e.name} and give its signature.", f"{e.signature}\n\n{e.text}"))
    if owner:
        asks = [f"Where is {short} defined?", f"Where do I find the {noun} {short}?", f"Which module has {short}?"]
        pairs.append((rng.choice(asks), f"The {noun} {short} is in {owner}."))
    return pairs


def page_pairs(source: str, text: str, topic: str) -> list[Pair]:
    """Pairs from the glossary and from pages whose headings are questions."""
    pairs: list[Pair] = []
    if topic == "glossary":
        for m in re.finditer(r"^   (\S.*)\n((?:      .*\n|\n)+)", source, re.M):
            term, body = inline(m[1]).strip("`"), first_paragraphs(inline(textwrap.dedent(m[2])), 500)
            article = "an" if term[0].lower() in "aeiou" else "a"
            asks = [f"What is {article} {term}?", f"What is {term}?", f"Define {term}.", f"What does {term} mean?"]
            pairs += [(q, body) for q in [*asks, f"Explain the term {term}."]]
    elif topic.startswith("faq/"):
        for m in re.finditer(r"^#+ (.*\?)\n+(.*?)(?=^#|\Z)", text, re.M | re.S):
            pairs += [(m[1], first_paragraphs(m[2], 700))] * 3
    return pairs


def code_pairs(source: str, module: str, topic: str, rng: random.Random) -> list[Pair]:
    """Pairs from the docstrings and the short functions of one module."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    pairs: list[Pair] = []
    if doc := ast.get_docstring(tree):
        pairs += entry_pairs(Entry("module", module, "", first_paragraphs(doc, 500), topic), rng)
    todo: list[tuple[str, ast.AST]] = [(module, n) for n in tree.body]
    while todo:
        owner, node = todo.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        is_class, name = isinstance(node, ast.ClassDef), f"{owner}.{node.name}"
        if is_class:
            todo += [(name, n) for n in node.body]
        doc = ast.get_docstring(node)
        if not doc or (node.name.startswith("_") and not node.name.startswith("__")):
            continue
        signature = "" if is_class else f"{name}({ast.unparse(node.args)})"
        kind = "class" if is_class else "function" if owner == module else "method"
        pairs += entry_pairs(Entry(kind, name, signature, first_paragraphs(doc, 500), topic), rng)
        code = textwrap.dedent("\n".join(source.split("\n")[node.lineno - 1 : node.end_lineno]))
        if not is_class and 3 < code.count("\n") < 24 and len(code) < 1000:
            bare = code.replace(source.split("\n")[node.body[0].lineno - 1], "", 1) if len(doc.split("\n")) == 1 else ""
            line = first_paragraphs(doc, 200)
            asks = [f"Write the function {name}.", f"Show the code of {name}.", f"Implement {name}."]
            pairs.append((rng.choice(asks), code))
            asks = ["What does this code do?", "Explain this function:", "Write a docstring for this function."]
            pairs.append((rng.choice(asks) + "\n\n" + (bare or code.split("\n")[0]), line))
            asks = ["Repeat this code:", "Copy this function:", "Print this code again:"]
            pairs.append((rng.choice(asks) + "\n\n" + code, code))
            pairs.append((f"Write a Python function. {line}", code))
    return pairs


def gather(docs_dir: Path, seed: int) -> tuple[dict[str, list[str]], dict[str, list[list[Pair]]]]:
    """All texts and conversations, by source and split ("docs", "code", "held-docs", ...)."""
    rng = random.Random(seed)
    texts: dict[str, list[str]] = {k: [] for k in ("docs", "code", "held-docs", "held-code")}
    pairs: dict[str, list[Pair]] = {"chat": [], "held-chat": []}
    for path in sorted(docs_dir.rglob("*.rst.txt")):
        page = str(path.relative_to(docs_dir)).removesuffix(".rst.txt")
        topic = page.removeprefix("library/")
        if page in ("whatsnew/changelog", "contents", "license") or path.stat().st_size < 400:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        text, entries = convert_rst(source, topic)
        held = "held-" * held_out(topic)
        texts[held + "docs"].append(text)
        for entry in entries:
            pairs[held + "chat"] += entry_pairs(entry, rng)
        pairs[held + "chat"] += page_pairs(source, text, topic)
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIP_STDLIB & set(relative.parts) or path.stat().st_size < 300:
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        held = "held-" * held_out(module)
        texts[held + "code"].append(source.replace("\t", "    ").strip())
        pairs[held + "chat"] += code_pairs(source, module, module, rng)
    talk = [(q, answer) for qs, answer in SMALL_TALK for q in qs.split("|")]
    sentences = [s for s in (a.split(". ")[0] for _, a in pairs["chat"]) if 20 < len(s) < 120]
    for sentence in rng.sample(sentences, 600):
        pairs["chat"].append((rng.choice(["Repeat: ", "Repeat after me: ", "Say this again: "]) + sentence, sentence))
    chats: dict[str, list[list[Pair]]] = {}
    for split, items in pairs.items():
        items = [(q, a) for q, a in items if 3 < len(a) < 1400]
        if split == "chat":
            items += talk * max(1, len(items) // (14 * len(talk)))  # about one conversation in fifteen
        rng.shuffle(items)
        chats[split] = []
        while items:  # one conversation in six has two or three turns; one in twelve has a system text
            turns = [items.pop() for _ in range(min(len(items), rng.choice([1] * 10 + [2, 3])))]
            if rng.random() < 1 / 12:
                turns[-1] = (rng.choice(SYSTEM_TEXTS) + "\n\n" + turns[-1][0], turns[-1][1])
            chats[split].append(turns)
    return texts, chats


# ---------------------------------------------------------------- tokens
def build_tokens(work: Path, docs_dir: Path, seed: int) -> dict[str, np.ndarray]:
    """Token streams, and for chats the masks of what is learnt; kept in the work directory."""
    cache = work / "tokens.npz"
    if not cache.exists():
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        write_tokenizer(work / "tekken.json")
        tekken = Tekkenizer.from_file(work / "tekken.json")
        texts, chats = gather(docs_dir, seed)
        random.Random(seed).shuffle(texts["docs"])
        random.Random(seed).shuffle(texts["code"])
        arrays: dict[str, np.ndarray] = {}
        for name, documents in texts.items():
            arrays[name] = np.array([t for d in documents for t in tekken.encode(d, bos=True, eos=True)], np.int16)
            arrays[name + "-bytes"] = np.array(sum(len(d.encode()) for d in documents))
        for name, conversations in chats.items():
            ids: list[int] = []
            mask: list[int] = []
            for turns in conversations:
                row, learn = [BOS], [0]
                for question, answer in turns:
                    q = [INST, *tekken.encode(question, bos=False, eos=False), END_INST]
                    a = [*tekken.encode(answer, bos=False, eos=False), EOS]
                    row, learn = row + q + a, learn + [0] * len(q) + [1] * len(a)
                if len(row) <= 512:
                    ids.extend(row)
                    mask.extend(learn)
            arrays[name], arrays[name + "-mask"] = np.array(ids, np.int16), np.array(mask, np.int8)
            arrays[name + "-bytes"] = np.array(sum(len(a.encode()) for c in conversations for _, a in c))
        np.savez(cache, **arrays)
    return dict(np.load(cache))


class Stream:
    """Shuffled windows of one source; where it stands is one number."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray | None, length: int, seed: int) -> None:
        self.ids, self.mask, self.length, self.seed, self.position = ids, mask, length, seed, 0
        self.starts = np.flatnonzero(ids == BOS) if mask is not None else None
        self.count = (len(ids) - 1) // length - 1

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        epoch, k = divmod(self.position, self.count)
        rng = np.random.default_rng([self.seed, self.length, epoch])
        start = int(rng.integers(self.length)) + int(rng.permutation(self.count)[k]) * self.length
        if self.starts is not None:  # a chat window begins where a conversation begins
            start = int(self.starts[min(np.searchsorted(self.starts, start), len(self.starts) - 1)])
            start = min(start, len(self.ids) - self.length - 1)
        self.position += 1
        window = self.ids[start : start + self.length + 1].astype(np.int64)
        target = window[1:].copy()
        if self.mask is not None:
            target[self.mask[start + 1 : start + self.length + 1] == 0] = -100
        return window[:-1], target


# ---------------------------------------------------------------- model (names as in HF checkpoints)
class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), CONFIG["rms_norm_eps"])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        h, self.d = CONFIG["hidden_size"], CONFIG["head_dim"]
        self.q, self.kv = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.q_proj = nn.Linear(h, self.q * self.d, bias=False)
        self.k_proj = nn.Linear(h, self.kv * self.d, bias=False)
        self.v_proj = nn.Linear(h, self.kv * self.d, bias=False)
        self.o_proj = nn.Linear(self.q * self.d, h, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.d).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = causal_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped causal attention by blocks of queries: on a CPU much faster to train than the fused kernel."""
    b, heads, t, d = q.shape
    kv, out, block = k.shape[1], [], max(128, t // 4)
    q, k, v = (q * d**-0.5).view(b, kv, heads // kv, t, d), k.flatten(0, 1), v.flatten(0, 1)
    for s in range(0, t, block):
        e = min(s + block, t)
        score = torch.bmm(q[:, :, :, s:e].reshape(b * kv, -1, d), k[:, :e].transpose(1, 2)).view(b * kv, -1, e - s, e)
        mask = torch.full((e - s, e), float("-inf"), dtype=score.dtype).triu(1 + s)
        weight = torch.softmax(score + mask, dim=-1).view(b * kv, -1, e)
        out.append(torch.bmm(weight, v[:, :e]).view(b, kv, heads // kv, e - s, d))
    return torch.cat(out, dim=3).view(b, heads, t, d)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        h, m = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj, self.up_proj = nn.Linear(h, m, bias=False), nn.Linear(h, m, bias=False)
        self.down_proj = nn.Linear(m, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = Norm(CONFIG["hidden_size"])
        self.post_attention_layernorm = Norm(CONFIG["hidden_size"])
        self.self_attn, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = Norm(CONFIG["hidden_size"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class Nemo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.compiled: Callable[..., Tensor] | None = None  # the same body, compiled, for training
        self.lm_head = nn.Linear(CONFIG["hidden_size"], CONFIG["vocab_size"], bias=False)
        residual = math.sqrt(2 * CONFIG["num_hidden_layers"])
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 / (residual if "o_proj" in name or "down_proj" in name else 1))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of the targets that are not -100."""
        d = CONFIG["head_dim"]
        angle = torch.outer(torch.arange(ids.shape[1]), CONFIG["rope_theta"] ** (-torch.arange(0, d, 2) / d))
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        body = self.compiled if self.training and self.compiled else self.model
        x = body(self.model.embed_tokens(ids).to(dtype), angle.cos().to(dtype), angle.sin().to(dtype))
        keep = targets.reshape(-1) >= 0
        return HeadLoss.apply(x.reshape(-1, x.shape[-1])[keep], self.lm_head.weight, targets.reshape(-1)[keep])


class HeadLoss(torch.autograd.Function):
    """Head and cross entropy in pieces that stay in the cache; gradients are made on the way forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, piece: int = 512) -> Tensor:
        w, total = weight.to(x.dtype), x.new_zeros((), dtype=torch.float32)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        for s in range(0, len(x), piece):
            rows, t = x[s : s + piece], targets[s : s + piece, None]
            logp = torch.log_softmax((rows @ w.T).float(), dim=-1)
            total -= logp.gather(1, t).sum()
            if any(ctx.needs_input_grad):
                p = logp.exp_().scatter_add_(1, t, torch.full(t.shape, -1.0)).to(x.dtype)
                dx[s : s + piece] = p @ w
                dw += p.T @ rows
        ctx.save_for_backward(dx, dw)
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        count = max(1, len(dx))
        return dx * (grad / count).to(dx.dtype), dw * (grad / count), None, None


# ---------------------------------------------------------------- optimiser
class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Newton-Schulz); for the matrices inside the layers."""

    def __init__(self, params: Iterator[nn.Parameter] | list[nn.Parameter], lr: float, decay: float) -> None:
        super().__init__(params, dict(lr=lr, momentum=0.95, decay=decay))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])  # Nesterov
                tall = x.shape[0] > x.shape[1]
                x = x.T if tall else x
                x = (x / (x.norm() + 1e-7)).to(torch.bfloat16)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_((x.T if tall else x).float(), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))


def schedule(done: float, decay_from: float) -> float:
    """Learning-rate factor at this share of the budget."""
    return min(1.0, done / 0.01 + 0.02) * min(1.0, max(0.0, (1 - done) / (1 - decay_from)))


# ---------------------------------------------------------------- output
def export(model: Nemo, out: Path) -> None:
    """Write the model directory."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, out / "model.safetensors.part", metadata={"format": "pt"})
    (out / "model.safetensors.part").chmod(0o644)
    os.replace(out / "model.safetensors.part", out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": EOS}, indent=2) + "\n")
    write_tokenizer(out / "tekken.json")


@torch.no_grad()
def evaluate(model: Nemo, tokens: dict[str, np.ndarray], windows: int) -> dict[str, float]:
    """Held-out loss in nats per token (chats: of the answers), over the first windows of each source."""
    losses = {}
    model.eval()
    for name in ("held-docs", "held-code", "held-chat"):
        ids, mask = tokens[name], tokens.get(name + "-mask")
        total, count = 0.0, 0
        for start in list(range(0, len(ids) - 1, 512))[:windows]:
            window = torch.from_numpy(ids[start : start + 513].astype(np.int64))
            target = window[1:].clone()
            if mask is not None:
                target[torch.from_numpy(mask[start + 1 : start + 513]) == 0] = -100
            if n := int((target >= 0).sum()):
                total, count = total + float(model(window[None, :-1], target[None])) * n, count + n
        losses[name], losses[name + "-tokens"] = total / max(count, 1), count
    model.train()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Train nemo-tiny on this machine's Python documentation and sources.")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemo-tiny"
    parser.add_argument("--minutes", type=float, default=80, help="time budget (default 80)")
    parser.add_argument("--out", type=Path, required=True, help="where to write the finished model directory")
    parser.add_argument("--work-dir", type=Path, default=cache, help="tokens and checkpoints (default: user cache)")
    parser.add_argument("--docs-dir", type=Path, default=Path(DOCS_DIR), help="reST sources of Python's documentation")
    parser.add_argument("--seed", type=int, default=7, help="random seed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 512 tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--decay-from", type=float, default=0.7, help="share of the budget after which the rate falls")
    parser.add_argument("--snapshot-minutes", type=float, default=5, help="minutes between snapshots")
    parser.add_argument("--fp32", action="store_true", help="do not use bfloat16 arithmetic")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokens = build_tokens(args.work_dir, args.docs_dir, args.seed)
    print("tokens:", {k: len(v) for k, v in tokens.items() if v.ndim and "mask" not in k}, flush=True)
    model = Nemo()
    model.compiled = torch.compile(model.model.forward, dynamic=False) if args.compile else None
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    optimizers: list[torch.optim.Optimizer] = [Muon(matrices, lr=args.lr, decay=0.05), adam]
    streams = {f"{s}-{n}": Stream(tokens[s], tokens.get(s + "-mask"), n, args.seed)
               for s in ("docs", "code", "chat") for n in (512, 2048)}  # fmt: skip
    step, elapsed, seen = 0, 0.0, 0
    checkpoint = args.work_dir / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name, position in saved["positions"].items():
            streams[name].position = position
        step, elapsed, seen = saved["step"], saved["elapsed"], saved["seen"]
        print(f"resumed at step {step}, {elapsed:.0f} s", flush=True)
    budget, begun, shown = args.minutes * 60, time.monotonic() - elapsed, 0.0
    next_snapshot = elapsed + args.snapshot_minutes * 60
    average, speed_mark = 0.0, (elapsed, seen)
    while elapsed < budget:
        done = elapsed / budget
        rng = np.random.default_rng([args.seed, step])
        chat = 0.12 if done < 0.6 else 0.5  # chats come last
        length = 2048 if done > 0.7 and step % 4 == 0 else 512  # some longer contexts near the end
        shares = [(1 - chat) * 0.68, (1 - chat) * 0.32, chat]
        sources = rng.choice(["docs", "code", "chat"], size=args.batch * 512 // length, p=shares)
        rows = [streams[f"{s}-{length}"].next() for s in sources]
        ids, targets = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            loss = model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(done, args.decay_from)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen, elapsed = step + 1, seen + ids.numel(), time.monotonic() - begun
        average = average + 0.05 * (loss.item() - average) if average else loss.item()
        if elapsed - shown > 15:
            speed = (seen - speed_mark[1]) / (elapsed - speed_mark[0])
            print(f"step {step}  {elapsed:.0f}/{budget:.0f} s  loss {average:.3f}  tokens {seen / 1e6:.2f}M  "
                  f"{speed:.0f} tok/s", flush=True)  # fmt: skip
            shown, speed_mark = elapsed, (elapsed, seen)
        if elapsed >= next_snapshot and elapsed < budget:
            next_snapshot += args.snapshot_minutes * 60
            export(model, args.work_dir / "snapshot")
            state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step,
                         seen=seen, elapsed=elapsed, positions={k: s.position for k, s in streams.items()})  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            print("held out:", {k: round(v, 3) for k, v in evaluate(model, tokens, 24).items()}, flush=True)
        export(model, args.work_dir / "snapshot")
    shutil.copytree(args.work_dir / "snapshot", args.out, dirs_exist_ok=True)
    model.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()})
    report = evaluate(model, tokens, 10**9) | dict(steps=step, tokens=seen, seconds=round(elapsed), seed=args.seed)
    (args.work_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print("done:", report, flush=True)


if __name__ == "__main__":
    main()
