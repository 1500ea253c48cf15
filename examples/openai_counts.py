"""Three expert counts side by side with the `openai` client: python examples/openai_counts.py [ADDRESS].

The requests run in one batch of the engine. None changes another's answer, so each is what it would be alone.
"""

import asyncio
import sys
import time

from openai import AsyncOpenAI

COUNTS = (1, 4, 8)
PROMPT = "Once upon a time"


async def ask(client: AsyncOpenAI, model: str, count: int) -> str:
    """The answer at one count, and how long it took."""
    began = time.perf_counter()
    answer = await client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=48,
        temperature=0.7,
        seed=1,
        extra_body={"num_experts": count},
    )
    return f"K = {count} ({time.perf_counter() - began:.2f} s): {PROMPT}{answer.choices[0].text}"


async def main(address: str) -> None:
    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="unused") as client:
        model = (await client.models.list()).data[0].id
        for line in await asyncio.gather(*(ask(client, model, count) for count in COUNTS)):
            print(line)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"))
