"""How a text is cut into words before byte-level BPE, by the names that GGUF files have for it.

A GGUF file holds tokens and merges but of the pre-tokenizer only a name, `tokenizer.ggml.pre`. Each entry is what the
published tokenizer.json of the models of that name says. Not here: vocabularies (see `weights/gguf/tokenizer.py`).
"""

from dataclasses import dataclass, replace
from typing import Any

Step = dict[str, Any]  # as in tokenizer.json


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One way to cut a text.

    Attributes:
        splits: regular expressions; each cuts what those before it have left.
        digits: every digit is a word.
        words: GPT-2's own expression cuts the rest.
        nfc: the text is brought to Unicode's NFC first.
        whole_words: a word that is a token becomes that token, whatever merges say.
        adds_bos: a text begins with the bos token, unless the file says otherwise.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    words: bool = False
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False

    @property
    def normalizer(self) -> Step | None:
        """The `normalizer` of a tokenizer.json."""
        return {"type": "NFC"} if self.nfc else None

    @property
    def pre_tokenizer(self) -> Step:
        """The `pre_tokenizer` of a tokenizer.json."""
        steps = [_split(expression) for expression in self.splits]
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": self.words})
        return {"type": "Sequence", "pretokenizers": steps}


def _split(expression: str) -> Step:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _ranges(*hexadecimal: str) -> str:
    """Characters as a regular expression's class has them, without brackets: `41-5A` is `A-Z`."""
    parts = (part for line in hexadecimal for part in line.split())
    return "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in parts)


SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # the ends of English short forms
ONE, THREE = r"\p{N}", r"\p{N}{1,3}"  # digits in a word
SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _letters(digits: str) -> str:
    """Words of letters, with one other character before them; OpenAI's cl100k has three digits to a word."""
    return rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACE}"


def _cases(digits: str = THREE, short: str = f"{SHORT}?", punctuation: str = r"[\r\n/]*", less: str = "") -> str:
    """Words that begin where a capital follows a small letter, as OpenAI's o200k has them. `short` may follow a word,
    `punctuation` other characters; `less` is taken from the letters."""
    large, small = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{less}]", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{less}]"
    words = (rf"[^\r\n\p{{L}}\p{{N}}]?{parts}{short}" for parts in (f"{large}*{small}+", f"{large}+{small}*"))
    return "|".join([*words, digits, rf" ?[^\s\p{{L}}\p{{N}}]+{punctuation}", SPACE])


# What DeepSeek's first tokenizers take for letters: those that have a capital, in most scripts.
_CASED = _ranges(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1",
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A",
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4",
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128",
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D",
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3",
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943",
)
_PUNCTUATION = _ranges("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_EAST_ASIAN = _ranges("4E00-9FA5 0800-4E00 AC00-D7FF")
_HAN_AND_KANA = _ranges("4E00-9FA5 3040-309F 30A0-30FF")
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACE}"
)
_QWEN35 = rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{ONE}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACE}"
_KIMI = r"[\p{Han}]+|" + _cases(punctuation=r"[\r\n]*", less=r"&&[^\p{Han}]")

_GPT2 = PreTokenizer(words=True)
_NEOX = PreTokenizer(words=True, nfc=True)
_STARCODER = PreTokenizer(digits=True, words=True)
_LLAMA3 = PreTokenizer((_letters(THREE),), whole_words=True, adds_bos=True)
_DEEPSEEK3 = PreTokenizer((THREE, rf"[{_HAN_AND_KANA}]+", _DEEPSEEK_V3))
_CL100K = PreTokenizer((_letters(THREE),))
_O200K = PreTokenizer((_cases(),), whole_words=True)

PRE_TOKENIZERS = {
    "chatglm-bpe": _CL100K,
    "command-r": PreTokenizer(digits=True, words=True, nfc=True),
    "dbrx": _CL100K,
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"[{_EAST_ASIAN}]+"), digits=True),
    "deepseek-llm": PreTokenizer(
        (r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_PUNCTUATION}]+", r"\s+$", rf"[{_EAST_ASIAN}]+"), digits=True
    ),
    "deepseek-v3": _DEEPSEEK3,
    "glm4": _CL100K,
    "gpt-2": _GPT2,
    "gpt-4o": _O200K,
    "joyai-llm": _DEEPSEEK3,  # what the converter calls DeepSeek-V3's where no bos token is added
    "kimi-k2": PreTokenizer((_KIMI,), whole_words=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "llama4": _O200K,
    "minimax-m2": PreTokenizer((_cases(),)),
    "mpt": _NEOX,
    "olmo": _NEOX,
    "phi-2": _GPT2,
    "qwen2": PreTokenizer((_letters(ONE),), nfc=True),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    "refact": _STARCODER,
    "smaug-bpe": replace(_LLAMA3, adds_bos=False),  # and Llama 3's
    "smollm": _STARCODER,
    "starcoder": _STARCODER,
    "tekken": PreTokenizer((_cases(ONE, short=""),), whole_words=True, adds_bos=True),
}
