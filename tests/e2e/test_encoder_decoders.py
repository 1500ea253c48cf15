"""A tiny Switch Transformer, served over real HTTP: the prompt is the encoder's, the answer the decoder's."""

from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from tests.e2e.live import serving
from tests.families import seq2seq
from tests.weights.words import write_tokenizer

pytestmark = pytest.mark.slow
TEXT, TOKENS, ANSWER_START = "Once upon a time there was a big dog.", 8, 3


def test_completions_of_an_encoder_decoder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, add_eos_token=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    prompt = [*tokenizer.encode(TEXT, add_special_tokens=False).ids, 0]
    changes = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0, "decoder_start_token_id": ANSWER_START}
    model = seq2seq.build("switch_transformers", 0, **changes)
    model.save_pretrained(tmp_path)
    expected = seq2seq.generated(model, prompt, TOKENS)
    flags = ("--model", str(tmp_path), "--served-name", "tiny", "--threads", "1", "--allow-extrapolated-experts")
    with serving(*flags) as live:
        ask: dict[str, Any] = {"model": "tiny", "prompt": TEXT, "max_tokens": TOKENS, "temperature": 0}
        create = live.client.completions.create
        answer = create(**ask)
        assert answer.choices[0].text == tokenizer.decode(expected) and len(answer.choices[0].text) > 3
        usage = answer.usage
        assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), TOKENS)
        figures: dict[str, Any] = usage.model_extra or {}
        assert figures["num_experts"] == 1
        text = "".join(part.choices[0].text for part in create(**ask, stream=True))
        assert text == answer.choices[0].text
        begun = [*prompt, *expected[:3]]
        rest = create(**ask | {"prompt": begun, "max_tokens": TOKENS - 3})
        assert rest.choices[0].text == tokenizer.decode(expected[3:])
        more = create(**ask, extra_body={"num_experts": 3})
        assert more.usage is not None and (more.usage.model_extra or {})["num_experts"] == 3
        ruled = create(
            **ask, extra_body={"experts": {"threshold": 0.9}}
        )  # counted as it runs: one expert in its layers
        assert ruled.usage is not None and (ruled.usage.model_extra or {})["num_experts"] == 1
        with pytest.raises(openai.BadRequestError, match="an encoder reads") as error:
            create(**ask, echo=True, logprobs=1)
        assert error.value.param == "prompt_logprobs"
