import random

import pytest

from moxe.data.holdout import document_hash, hold_out
from moxe.errors import UserError

DOCUMENTS = [f"{word} text about {word}" for word in "abcdefghijklmnopqrstuvwxyz"]


def held_out(documents, fraction=0.3, count=None):
    return hold_out(lambda: iter(documents), fraction=fraction, count=count)


def test_the_hash_of_a_text_is_the_same_everywhere():
    assert document_hash("The cat") == 14850201431924577914


def test_copies_that_differ_in_case_spacing_punctuation_or_numbers_have_one_hash():
    assert document_hash("The cat sat (twice).\n") == document_hash("the  CAT, sat twice 2")
    assert document_hash("The cat sat") != document_hash("The cat ate")
    assert document_hash("1 + 1") != document_hash("1 + 2")


def test_the_order_and_the_other_documents_do_not_matter():
    expected = set(held_out(DOCUMENTS))
    assert 0 < len(expected) < len(DOCUMENTS)
    shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
    assert set(held_out(shuffled)) == expected
    assert set(held_out(DOCUMENTS[:13])) == expected & set(DOCUMENTS[:13])


def test_held_out_documents_keep_their_order():
    texts = held_out(DOCUMENTS)
    assert texts == [text for text in DOCUMENTS if text in texts]


def test_about_the_fraction_is_held_out():
    documents = [f"{a}{b}{c} text" for a in "abcdefghij" for b in "abcdefghij" for c in "abcdefghij"]
    assert 30 <= len(held_out(documents, fraction=0.05)) <= 70


def test_more_is_held_out_with_a_larger_fraction_and_nothing_less():
    assert set(held_out(DOCUMENTS, fraction=0.1)) < set(held_out(DOCUMENTS, fraction=0.5))


def test_copies_go_together():
    copies = [text.upper() + "!" for text in DOCUMENTS]
    texts = held_out(DOCUMENTS + copies)
    assert {text.upper() + "!" for text in texts if text in DOCUMENTS} == set(texts) - set(DOCUMENTS)


def test_a_count_is_met_exactly():
    for count in (1, 5, 25):
        assert len(held_out(DOCUMENTS, count=count)) == count


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_parts_hold_at_least_one_document(fraction):
    assert len(held_out(["one", "two"], fraction=fraction)) == 1


def test_a_single_document_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"single document.*data\.validation_source, or data\.document_separator"):
        held_out(["one", "One!"])


def test_more_documents_than_there_are_is_refused():
    with pytest.raises(UserError, match="validation_documents is 26, but the source has 26 distinct documents"):
        held_out(DOCUMENTS, count=26)
