"""Kill a batch run again and again, and see that nothing is lost, doubled or torn; or let its disk fill up.

``python tests/batch/kills.py --kills 50`` does so with the command and the bundled model, ``--room 64`` on a disk that
gets 64 KiB more whenever it is full (as root); ``test_kills`` kills a scripted run a few times.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def write_lines(path: Path, count: int) -> None:
    """A file of all kinds of lines, good and bad, without a last newline."""
    lines = []
    for index in range(count):
        messages = [{"role": "user", "content": f"Hello, number {index}"}]
        chat = {"messages": messages, "max_tokens": 6, "seed": index}
        url = "/v1/chat/completions"
        lines.append(
            [
                json.dumps({"custom_id": f"chat-{index}", "method": "POST", "url": url, "body": chat}),
                json.dumps({"prompt": f"def number_{index}(x):", "max_tokens": 8, "seed": index, "temperature": 1.0}),
                json.dumps({"id": f"load-{index}", "prompt": f"x = {index}", "output_tokens": 5}),
                json.dumps({"messages": messages, "seed": index, "max_tokens": 5}),
            ][index % 4]
        )
    lines[count // 3] = '{"broken": '
    lines[count // 2] = json.dumps({"custom_id": "wrong", "method": "POST", "url": "/v1/embeddings", "body": {}})
    lines[-2] = lines[0]
    path.write_text("\n".join(lines))


def results(path: Path, *, is_cut: bool = False) -> list[dict[str, Any]]:
    """The results in a file; of one that was cut off, the whole ones."""
    if not path.exists():
        return []
    data = path.read_bytes()
    if path.suffix == ".gz":
        if is_cut:
            inflated = b""
            while data:
                inflater = zlib.decompressobj(wbits=31)
                part = inflater.decompress(data)
                inflated, data = inflated + (part if inflater.eof else b""), inflater.unused_data
            data = inflated
        else:
            data = gzip.decompress(data)
    whole, newline, rest = data.rpartition(b"\n")
    assert is_cut or not rest, "a torn line was left"
    return [json.loads(line) for line in (whole + newline).splitlines()]


def what_matters(result: dict[str, Any]) -> str:
    """A result without what differs from run to run: ids, times, hits in a cache."""
    response = result["response"]
    body = {} if response is None else response["body"]
    kept = {name: value for name, value in body.items() if name not in ("id", "created", "usage")}
    usage = {name: value for name, value in body.get("usage", {}).items() if not name.endswith("_details")}
    return json.dumps([result["id"], result["custom_id"], kept, usage, result["error"]], sort_keys=True)


def union(target: Path, *, is_cut: bool = False) -> Counter[str]:
    """What matters of all results, with how often each is there."""
    both = [*results(target, is_cut=is_cut), *results(Path(f"{target}.errors"), is_cut=is_cut)]
    return Counter(map(what_matters, both))


def killed(
    command: Callable[[Path], Sequence[str]], source: Path, target: Path, num_kills: int, seed: int, start_up: float
) -> Counter[int]:
    """Run ``command(target)``, kill it at a random moment, and again; returns how many results there were after each
    kill.

    One in four is killed within ``start_up`` seconds, the others some results after those that were there.
    """
    dice = random.Random(seed)
    num_lines = len(source.read_bytes().splitlines())
    counts: Counter[int] = Counter()
    for kill in range(num_kills):
        process = subprocess.Popen(command(target), cwd=ROOT, stderr=subprocess.PIPE)
        if kill % 4 == 0:
            time.sleep(start_up * dice.random())
        else:
            size = _size(target)
            more = dice.randint(1, max(1, num_lines // num_kills)) * 300
            while process.poll() is None and _size(target) < size + more:
                time.sleep(0.002)
            time.sleep(0.02 * dice.random())
        process.kill()
        _, said = process.communicate()
        assert process.returncode in (-9, 0, 1), said.decode()
        there = union(target, is_cut=True)
        assert not there or max(there.values()) == 1, "a result is there twice"
        counts[sum(there.values())] += 1
    return counts


def filled(command: Callable[[Path], Sequence[str]], target: Path, room: int) -> list[int]:
    """Run ``command(target)`` on a disk of ``room`` KiB, which grows by as much whenever it is full, to the end;
    returns how many results there were each time.
    """
    counts: list[int] = []
    size = room
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(target.parent)], check=True)
    while True:
        run = subprocess.run(command(target), cwd=ROOT, stderr=subprocess.PIPE)
        if run.returncode in (0, 1) and b"No space left" not in run.stderr:
            return counts
        assert b"No space left" in run.stderr and b"goes on from there" in run.stderr, run.stderr.decode()
        there = union(target)
        assert not there or max(there.values()) == 1, "a result is there twice"
        counts.append(sum(there.values()))
        size += room
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(target.parent)], check=True)


def finished(command: Callable[[Path], Sequence[str]], target: Path) -> Counter[str]:
    """What a run has in the end that is left to it."""
    run = subprocess.run(command(target), cwd=ROOT, stderr=subprocess.PIPE)
    assert run.returncode in (0, 1), run.stderr.decode()
    return union(target)


def _size(target: Path) -> int:
    return sum(path.stat().st_size for path in (target, Path(f"{target}.errors")) if path.exists())


def main() -> None:
    from nemo_engine.benchmarks.provenance import append_record, provenance

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--room", type=int, help="KiB of a disk that fills up, in place of kills")
    parser.add_argument("--lines", type=int, default=800)
    parser.add_argument("--suffix", default=".jsonl")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append a record of the outcome to this file")
    args = parser.parse_args()

    def command(target: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "nemo_engine", "batch", "nemo-tiny", str(source), str(target)),
            *("--device", "cpu", "--dtype", "float32", "--num-kv-pages", "200", "--max-num-seqs", "4", "--seed", "5"),
        ]

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        write_lines(source, args.lines)
        began = time.monotonic()
        wanted = finished(command, Path(folder) / f"once{args.suffix}")
        seconds = time.monotonic() - began
        disk = Path(folder) / "disk"
        disk.mkdir()
        target = disk / f"target{args.suffix}"
        if args.room:
            try:
                counts = filled(command, target, args.room)
                found = finished(command, target)
            finally:
                subprocess.run(["umount", str(disk)])
        else:
            counts = sorted(killed(command, source, target, args.kills, args.seed, start_up=5.0).elements())
            found = finished(command, target)
    lost, extra = wanted - found, found - wanted
    print(f"one run: {sum(wanted.values())} results of {args.lines} lines, {seconds:.1f} s")
    print(f"{len(counts)} {'times full' if args.room else 'kills'}, with so many results after them: {counts}")
    print("equal" if found == wanted else f"DIFFERENT: {len(lost)} lost, {len(extra)} too many")
    for name in list(lost + extra)[:6]:
        print(name)
    outcome = {"results": sum(wanted.values()), "results_after": counts, "lost": len(lost), "extra": len(extra)}
    workload = {name: value for name, value in vars(args).items() if name not in ("json", "kills" if args.room else "")}
    append_record(args.json, {"benchmark": "batch_kills", "workload": workload, **outcome, **provenance("torch")})
    sys.exit(found != wanted)


if __name__ == "__main__":
    main()
