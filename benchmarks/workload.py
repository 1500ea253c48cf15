"""The one workload of the end-to-end benchmarks: so many different random prompts of so many tokens, so many new
tokens. It does not depend on the system."""

import torch

PROMPT, OUTPUT = 128, 64
LARGEST_BATCH = 32


def prompts(batch: int, vocabulary: int) -> list[list[int]]:
    """Different random prompts of PROMPT tokens; the same for every system. The first ids, often special, are left
    out."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, vocabulary, (batch, PROMPT), generator=generator).tolist()


def random_prompt(length: int, vocabulary: int) -> list[int]:
    """One prompt of so many random tokens."""
    found: list[int] = torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(7)).tolist()
    return found
