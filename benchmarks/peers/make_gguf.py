"""A GGUF file of a checkpoint for the llama.cpp peer, by llama.cpp's own converter.

The converter is in the source package of llama-cpp-python, not in what pip installs:

    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python==0.3.36
    mkdir llama.cpp
    tar xzf llama_cpp_python-0.3.36.tar.gz -C llama.cpp --strip-components=3 --wildcards '*/vendor/llama.cpp/*'
    python benchmarks/peers/make_gguf.py nemo-tiny nemo-tiny.gguf --llama-cpp llama.cpp

Needs transformers, which turns a Tekken vocabulary into the tokenizer that the converter reads. The converter knows a
tokenizer by a hash of what it makes of a sample, so it knows no vocabulary that was cut, such as nemo-tiny's: here it
is told that the rules are Tekken's. The peer uses token ids alone.
"""

from __future__ import annotations

import argparse
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

from nemo_engine.benchmarks.common import resolve_model


def with_tokenizer(model: Path, folder: Path) -> None:
    """Fill ``folder`` with the checkpoint ``model`` and a tokenizer that transformers can load; any .safetensors are
    linked.
    """
    from transformers.integrations.mistral import convert_tekken_tokenizer

    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file.resolve())
        elif file.suffix == ".json" and file.name != "tekken.json":
            shutil.copy(file, folder / file.name)
    if not (folder / "tokenizer.json").exists():
        convert_tekken_tokenizer(str(model / "tekken.json")).save_pretrained(folder)


def convert(folder: Path, out: Path, llama_cpp: Path, kind: str) -> None:
    """Run the converter of ``llama_cpp`` on ``folder``; ``kind`` is its --outtype."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "tekken"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(out), "--outtype", kind]
    runpy.run_path(str(llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, or nemo-tiny")
    parser.add_argument("out", metavar="FILE", type=Path)
    parser.add_argument("--llama-cpp", metavar="DIR", type=Path, required=True, help="where convert_hf_to_gguf.py is")
    parser.add_argument("--outtype", default="bf16", metavar="NAME", help="the type of the weights [%(default)s]")
    args = parser.parse_args()
    if not (args.llama_cpp / "convert_hf_to_gguf.py").is_file():
        parser.error(f"--llama-cpp must be a directory with convert_hf_to_gguf.py, got {args.llama_cpp}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with_tokenizer(resolve_model(args.model)[0], Path(folder))
        except ValueError as error:
            parser.error(str(error))
        convert(Path(folder), args.out, args.llama_cpp, args.outtype)


if __name__ == "__main__":
    main()
