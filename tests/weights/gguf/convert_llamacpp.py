"""Checkpoints as GGUF files, by llama.cpp's converter: `python convert_llamacpp.py SOURCE FOLDER OUT [FOLDER OUT]...`

Run by the interpreter of llama.cpp's own venv; imports nothing of ours. Two detours: random checkpoints have no
tokenizer, so none is written; and no layers for multi-token prediction are looked for.
"""

import sys
from typing import Any


def main(source: str, pairs: list[str]) -> None:
    """Convert each folder to its file, as float32."""
    sys.path[:0] = [source, f"{source}/gguf-py"]
    import convert_hf_to_gguf

    class_of = convert_hf_to_gguf.get_model_class

    def without_tokenizer(name: str, **more: Any) -> Any:
        found: Any = class_of(name, **more)

        def set_vocab(self: Any) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

        found.set_vocab, found.no_mtp = set_vocab, True
        return found

    convert_hf_to_gguf.get_model_class = without_tokenizer
    for folder, out in zip(pairs[::2], pairs[1::2], strict=True):
        sys.argv = ["convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", out]
        convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
