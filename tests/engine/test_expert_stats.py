"""What mixtures tell of a step counts the same, told one by one or all at once."""

import torch

from engine.expert_stats import ExpertStats


def test_loads_told_at_once_count_as_those_of_each_mixture() -> None:
    load_LE = [torch.tensor([1, 1, 0, 0]), torch.tensor([0, 3, 0, 0])]
    each, together = ExpertStats(2), ExpertStats(2)
    for layer, (pairs, load_E) in enumerate(zip([2, 3], load_LE, strict=True)):
        each.routed(layer, pairs, load_E, None)
    together.routed_all([2, 3], torch.cat(load_LE), [4, 4])
    for stats in (each, together):
        stats.count_pairs(())
        assert (stats.pairs, stats.load_count) == (5, 2)
    assert torch.equal(torch.cat(each.loads), torch.cat(together.loads))
