# SPDX-License-Identifier: Apache-2.0
"""CIDEr, BLEU and ROUGE-L of captions, number for number as the COCO caption evaluation code gives them.

METEOR and SPICE are left out: both need Java.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from aced_sdk.errors import EvaluationError

Tokens = tuple[str, ...]
Counts = Counter[Tokens]

_ORDER = 4  # n-grams of one to four words
_SIGMA = 6.0  # words; width of CIDEr-D's penalty on a length that is not the reference's
_BETA = 1.2  # ROUGE-L's weight of recall over precision
# BLEU's guards against division by zero. They leak into scores of captions under four words, there as here.
_SMALL, _TINY = 1e-9, 1e-15

_TOKEN = re.compile(
    r"""
      (?:[a-z]\.){2,} | (?:mr|mrs|ms|dr|st|vs|jr|sr|etc)\. | no\.(?=\ \d)  # abbreviations keep their period
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b)                    # can not, gon na
    | n['’]t\b | ['’](?:s|re|ve|ll|d|m|n['’])(?!\w) | o['’]clock\b | y['’](?=all\b)
    | [-+]?\d+(?:[.,:]\d+)+ | \.\d+                                       # 3.5, 1,000, 10:30
    | (?:(?!n['’]t\b)\w)+ (?:[-/&](?:(?!n['’]t\b)\w)+)*                   # do n't, black-and-white, 1/2
    | \S
    """,
    re.VERBOSE,
)
_PUNCTUATION = frozenset("'`‘’“”\".?!,:;-–—…")


def tokens(text: str) -> Tokens:
    """Lower-case words as the Penn Treebank cuts them ("does n't", "cat 's"), without punctuation.

    It stands for Stanford's PTBTokenizer, which the COCO code runs in Java. Differences are rare: some abbreviations,
    currencies and emoticons.
    """
    found = (word.replace("’", "'") for word in _TOKEN.findall(text.lower()))
    return tuple(word for word in found if word not in _PUNCTUATION)


def caption_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of captions against their references.

    Args:
        texts: N captions, one for each picture.
        references: for each picture, its captions by people (or whatever is right).

    Returns:
        `cider` (CIDEr-D; 0 to 10, published tables give it times 100), `bleu_1` to `bleu_4` (0 to 1, over all captions)
        and `rouge_l` (0 to 1). CIDEr weighs words by how few of these N pictures they are said of: it cannot be
        compared between sets, and is 0 for one picture.

    Raises:
        EvaluationError: if the numbers differ, there is nothing to score, or a picture has no reference.

    Source: CIDEr-D, arXiv 1411.5726, section 3 and appendix; BLEU, ACL 2002; ROUGE-L, Lin 2004; all in the form of the
    COCO caption evaluation, arXiv 1504.00325.
    """
    if len(texts) != len(references) or not texts:
        raise EvaluationError(
            f"there are {len(texts)} captions and {len(references)} sets of references",
            remedy="give references for each caption, and at least one",
            field="references",
        )
    if bare := [number for number, group in enumerate(references) if not group]:
        raise EvaluationError(
            f"caption {bare[0]} has no reference", remedy="leave it out or add one", field="references"
        )
    said = [tokens(text) for text in texts]
    right = [[tokens(one) for one in group] for group in references]
    return {"cider": cider(said, right), **bleu(said, right), "rouge_l": rouge_l(said, right)}


def cider(said: Sequence[Tokens], right: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr-D: the mean over pictures, references and n-gram orders of a clipped tf-idf cosine, times 10."""
    references = [[_grams(one) for one in group] for group in right]
    pictures = Counter(gram for group in references for gram in set().union(*group))

    def weights(counts: Counts) -> dict[Tokens, float]:
        return {gram: n * math.log(len(said) / max(1, pictures[gram])) for gram, n in counts.items()}

    total = 0.0
    for words, group in zip(said, references, strict=True):
        mine, my_length = weights(_grams(words)), max(0, len(words) - 1)  # the COCO code counts length in bigrams
        for counts in group:
            length = sum(n for gram, n in counts.items() if len(gram) == 2)
            penalty = math.exp(-((my_length - length) ** 2) / (2 * _SIGMA**2))
            total += 10 * penalty * _cosines(mine, weights(counts)) / _ORDER / len(group)
    return total / len(said)


def _cosines(mine: dict[Tokens, float], theirs: dict[Tokens, float]) -> float:
    """Summed over the orders of n-grams; what is said more often than in the reference earns nothing."""
    shared, first, second = [0.0] * _ORDER, [0.0] * _ORDER, [0.0] * _ORDER
    for gram, weight in mine.items():
        first[len(gram) - 1] += weight * weight
        other = theirs.get(gram, 0.0)
        shared[len(gram) - 1] += min(weight, other) * other
    for gram, weight in theirs.items():
        second[len(gram) - 1] += weight * weight
    return sum(s / math.sqrt(a * b) for s, a, b in zip(shared, first, second, strict=True) if a and b)


def bleu(said: Sequence[Tokens], right: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """Corpus BLEU-1 to BLEU-4, against the reference of closest length."""
    hits, guesses = [0] * _ORDER, [0] * _ORDER
    length = closest = 0
    for words, group in zip(said, right, strict=True):
        most: Counts = Counter()
        for one in group:
            most |= _grams(one)
        for gram, n in (_grams(words) & most).items():
            hits[len(gram) - 1] += n
        for order in range(_ORDER):
            guesses[order] += max(0, len(words) - order)
        length += len(words)
        closest += min((abs(len(one) - len(words)), len(one)) for one in group)[1]
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = min(1.0, math.exp(1 - 1 / ratio))
    scores, product = {}, 1.0
    for order in range(_ORDER):
        product *= (hits[order] + _TINY) / (guesses[order] + _SMALL)
        scores[f"bleu_{order + 1}"] = brevity * product ** (1 / (order + 1))
    return scores


def rouge_l(said: Sequence[Tokens], right: Sequence[Sequence[Tokens]]) -> float:
    """The mean F-measure of the longest common subsequence, with the best precision and recall over references."""
    total = 0.0
    for words, group in zip(said, right, strict=True):
        common = [_common(words, one) for one in group]
        precision = max(common) / max(1, len(words))
        recall = max(n / max(1, len(one)) for n, one in zip(common, group, strict=True))
        if precision and recall:
            total += (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return total / len(said)


def _common(first: Tokens, second: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for one in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if one == other else max(row[place], row[place - 1])
    return row[-1]


def _grams(words: Tokens) -> Counts:
    """How often each n-gram of one to four words occurs."""
    return Counter(words[i : i + n] for n in range(1, _ORDER + 1) for i in range(len(words) - n + 1))
