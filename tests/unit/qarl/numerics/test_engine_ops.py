"""The engine's attention, called from the learner: what its bits depend on."""

import torch

from qarl.numerics import processor
from qarl.numerics.engine_ops import PagedLayout, same_prefill_tokens
from qarl.numerics.flat import Row


def test_a_long_prefill_does_not_depend_on_threads_or_other_prompts() -> None:
    """Without its one thread, 1,400 tokens in heads of 128 have other bits on two."""
    generator = torch.Generator().manual_seed(0)
    q_NHD = torch.randn(1500, 2, 128, generator=generator)
    k_NGD, v_NGD = torch.randn(2, 1500, 1, 128, generator=generator)
    alone = PagedLayout([Row(0, 1400, 1400, 0, True)])
    both = PagedLayout([Row(0, 1400, 1400, 0, True), Row(1400, 100, 1500, 0, True)])
    expected = alone.attend(q_NHD[:1400], k_NGD[:1400], v_NGD[:1400], 0.1)
    for number in (1, 2, 5):
        with processor.threads(number):
            assert torch.equal(both.attend(q_NHD, k_NGD, v_NGD, 0.1)[:1400], expected)


def test_short_contexts_are_prefilled_alike() -> None:
    """The wider the heads, the fewer keys fit into a tile; a decoded token agrees with a prefilled one up to there."""
    lengths = [same_prefill_tokens(width, 600) for width in (32, 128, 256)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] % 32 == 0
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        q_NHD = torch.randn(lengths[-1], 4, 256, generator=generator).to(dtype)
        k_NGD, v_NGD = torch.randn(2, lengths[-1], 2, 256, generator=generator).to(dtype)
        prefilled, decoded = (
            PagedLayout([Row(0, n, n, lengths[-1] - n, True)]).attend(q_NHD, k_NGD, v_NGD, 0.1)
            for n in (lengths[-1], 1)
        )
        assert torch.equal(prefilled, decoded)
