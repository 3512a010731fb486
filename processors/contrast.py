"""Contrast of learnt words: what the text encoder makes of a new word stays away from the other concepts.

Ours, after the idea of CustomContrast (Chen et al., AAAI 2025, arXiv 2409.05606): things are learnt better by what
tells them apart. Theirs are the features of an encoder that is trained on many views of many things; there is no
public code. Here there is one picture, so that what is contrasted are the text states of the captions of a batch. It is
InfoNCE (van den Oord et al., arXiv 1807.03748), with the mean over positives outside of the logarithm as in supervised
contrast (Khosla et al., NeurIPS 2020, arXiv 2004.11362):

    s(a, b) = cos(a, b) / temperature
    loss = mean over anchors a, mean over positives p of a, of
           -log(exp s(a, p) / (exp s(a, p) + sum over negatives n of exp s(a, n)))

Anchors are the states of the new words, one for each row that has the word; positives are those of the same word in
other rows; negatives are those of the other new words and of their class nouns, in all rows. The own noun is neither:
the word begins as its noun, and may stay near it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(words: Tensor, nouns: Tensor, present: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss, from 0; 0 where no anchor has both a positive and a negative. Float32 or wider.

    Args:
        words: (rows, concepts, width), text states of the new words.
        nouns: of the same shape, of their class nouns.
        present: (rows, concepts) bool, whether the row's caption has the concept.
        temperature: above 0; the smaller, the more the nearest negative counts.
    """
    wide = torch.promote_types(words.dtype, torch.float32)
    rows, concepts = present.shape
    there = present.flatten()  # (anchors,)
    concept = torch.arange(concepts, device=there.device).repeat(rows)
    row = torch.arange(rows, device=there.device).repeat_interleave(concepts)
    own = concept[:, None] == concept  # (anchors, anchors)
    both = there[:, None] & there
    a, b = (F.normalize(x.to(wide).flatten(0, 1), dim=-1) for x in (words, nouns))
    to_words, to_nouns = a @ a.mT / temperature, a @ b.mT / temperature
    away = both & ~own
    negatives = torch.cat([to_words, to_nouns], 1).masked_fill(~torch.cat([away, away], 1), float("-inf"))
    positive = both & own & (row[:, None] != row) & away.any(1, keepdim=True)
    if not positive.any():
        return a.sum() * 0
    rest = torch.where(away.any(1, keepdim=True), negatives, 0.0).logsumexp(1, keepdim=True)
    each = torch.where(positive, F.softplus(rest - to_words), 0.0)
    count = positive.sum(1)
    return (each.sum(1) / count.clamp_min(1)).sum() / (count > 0).sum()
