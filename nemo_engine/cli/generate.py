"""``nemo-engine generate``: complete prompts from the command line, files or stdin."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from nemo_engine.checks import check_unicode
from nemo_engine.cli import arguments, batch
from nemo_engine.cli.files import read_text
from nemo_engine.cli.report import as_json, summary
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import SamplingParams


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "generate",
        help="complete one or more prompts",
        description="Complete prompts and print the text as it comes. Several prompts run at once and are shown in "
        "order. "
        "Without --prompt and --prompt-file, each line of stdin is a prompt. --input and --output are the files of "
        "nemo-engine batch.",
        usage="%(prog)s MODEL [--prompt TEXT]... [--prompt-file FILE]... [--json] | --input IN --output OUT [options]",
        allow_abbrev=False,
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument(
        "--prompt-file", action="append", default=[], metavar="FILE",
        help="a file whose text, less one final line break, is a prompt ('-': all of stdin); may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print each finished request as one line of JSON instead")
    parser.add_argument("--stats", action="store_true", help="after each request, its token counts and times on stderr")
    parser.add_argument("--input", metavar="IN", help="a file of requests, as nemo-engine batch takes them")
    parser.add_argument("--output", metavar="OUT", help="a file for their results, with OUT.errors for failures")
    batch.add_force(parser)
    arguments.add_sampling_arguments(parser)
    arguments.add_engine_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a request ended with an error."""
    if args.input is not None or args.output is not None or args.force:
        if args.input is None or args.output is None:
            raise ValueError("--input and --output go together: give both or neither, and --force beside them alone")
        for name in ("prompt", "prompt_file", "json", "stats"):
            if getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} does not go with --input, whose lines are the prompts")
        return batch.answer_file(args, args.model, {})
    params = SamplingParams(**arguments.sampling_options(args))
    prompts = read_prompts(args)
    from nemo_engine.engine.engine import Engine

    failed = 0
    with Engine(args.model, **arguments.engine_options(args)) as engine:
        if args.json:
            finished: Iterator[RequestOutput] = iter(engine.generate(list(prompts), params))
        else:
            finished = print_in_order(engine.stream(list(prompts), params), len(prompts), params.n)
        for output in finished:
            if args.json:
                print(json.dumps(as_json(output), ensure_ascii=False), flush=True)
            if args.stats:
                print(summary(output), file=sys.stderr)
            for completion in output.outputs:
                if completion.finish_reason == "error":
                    print(f"nemo-engine: error: {completion.error}", file=sys.stderr)
                    failed += 1
    return 1 if failed else 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts in the order: ``--prompt``, ``--prompt-file``; without both, the lines of stdin."""
    prompts = list(args.prompt)
    for prompt in prompts:
        check_unicode("--prompt", prompt)
    for name in args.prompt_file:
        text = sys.stdin.read() if name == "-" else read_text("--prompt-file", Path(name))
        check_unicode("standard input", text)
        prompts.append(text.removesuffix("\n").removesuffix("\r"))
    if not args.prompt and not args.prompt_file:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe lines in")
        lines = [line.rstrip("\r\n") for line in sys.stdin]
        for number, line in enumerate(lines, 1):
            check_unicode(f"line {number} of standard input", line)
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError("no prompt: stdin holds no line of text")
        if all(_is_json_object(line) for line in prompts):
            warnings.warn(
                "standard input looks like JSON lines, and each line is a prompt as it stands; requests in JSON go "
                "through --input FILE --output OUT",
                stacklevel=2,
            )
    return prompts


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def print_in_order(outputs: Iterator[RequestOutput], num_prompts: int, n: int) -> Iterator[RequestOutput]:
    """Print interleaved deltas in the order of (prompt, completion): the first that is not done as it comes, the others
    when their turn is there. Yields what is left to say of each request when all its text is out."""
    order = [(prompt, index) for prompt in range(num_prompts) for index in range(n)]
    held: dict[tuple[int, int], list[str]] = {key: [] for key in order}
    done: dict[tuple[int, int], RequestOutput] = {}
    has_heads = len(order) > 1
    turn = 0
    is_head_due = has_heads
    for output in outputs:
        prompt = int(output.request_id)
        for completion in output.outputs:
            held[prompt, completion.index].append(completion.text)
        if output.finished:
            done.update({(prompt, index): output for index in range(n)})
        while turn < len(order):
            key = order[turn]
            if is_head_due and (held[key] or key in done):
                print(f"==> prompt {key[0] + 1}" + (f", completion {key[1] + 1}" if n > 1 else "") + " <==")
                is_head_due = False
            sys.stdout.write("".join(held[key]))
            sys.stdout.flush()
            held[key].clear()
            if key not in done:
                break
            print(flush=True)
            if key[1] == n - 1:
                yield done[key]
            turn += 1
            is_head_due = has_heads
