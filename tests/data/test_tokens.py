import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moxe.data import tokens
from moxe.data.encoding import token_dtype
from moxe.data.tokenizer import train_tokenizer
from moxe.data.tokens import TokenDocuments, cut, tokenize_documents
from moxe.errors import UserError

TRAINED = train_tokenizer([f"The cat number {i} sat on the mat." for i in range(50)], 300)


def test_each_document_lies_between_bos_and_eos():
    documents = ["The cat", "sat on", "The mat."]
    for text, ids in zip(documents, tokenize_documents(documents, TRAINED), strict=True):
        assert ids[0] == TRAINED.bos_token_id
        assert ids[-1] == TRAINED.eos_token_id
        assert TRAINED.decode(ids[1:-1]) == text


def test_batches_change_nothing(monkeypatch):
    documents = [f"The cat number {i} sat" for i in range(20)]
    whole = [ids.tolist() for ids in tokenize_documents(documents, TRAINED)]
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 50)
    assert [ids.tolist() for ids in tokenize_documents(documents, TRAINED)] == whole


def test_a_special_token_inside_a_text_is_text():
    (ids,) = tokenize_documents(["a <|endoftext|> b"], TRAINED)
    assert (ids == TRAINED.eos_token_id).sum() == 2
    assert TRAINED.decode(ids[1:-1]) == "a <|endoftext|> b"


def test_what_a_tokenizer_cuts_pads_and_adds_by_itself_is_left_out():
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    inner.enable_truncation(4)
    inner.enable_padding(length=12)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    (ids,) = tokenize_documents(["a a a a a a"], tokenizer)
    assert ids.tolist() == [0, 2, 2, 2, 2, 2, 2, 1]
    assert tokenizer.backend_tokenizer.truncation is not None


def test_ids_take_two_bytes_where_they_fit():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_the_largest_id_survives_the_disk(write_documents, vocab_size):
    documents = write_documents([vocab_size - 1, 0], vocab_size=vocab_size)
    assert documents[0].tolist() == [vocab_size - 1, 0]


def test_documents_come_back_from_disk(write_documents):
    documents = write_documents([1, 2, 3], [4], [5, 6])
    assert [ids.tolist() for ids in documents] == [[1, 2, 3], [4], [5, 6]]
    assert documents[-1].tolist() == [5, 6]
    assert [ids.tolist() for ids in documents[1:]] == [[4], [5, 6]]
    assert (len(documents), documents.num_tokens, documents.vocab_size) == (3, 6, 100)
    with pytest.raises(IndexError):
        documents[3]


def test_no_documents_at_all_can_be_written(write_documents):
    documents = write_documents()
    assert (len(documents), documents.num_tokens) == (0, 0)


def test_a_copy_for_a_worker_maps_the_same_file(write_documents):
    documents = write_documents([1, 2, 3] * 10_000)
    pickled = pickle.dumps(documents)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert isinstance(copy, TokenDocuments)
    assert copy[0].tolist() == documents[0].tolist()


@pytest.mark.parametrize(
    ("max_tokens", "lengths"), [(1, [1]), (4, [4]), (7, [4, 3]), (9, [4, 5]), (15, [4, 5, 6]), (100, [4, 5, 6])]
)
def test_documents_are_cut_after_so_many_tokens(max_tokens, lengths):
    tokens, kept = cut((np.arange(15), np.array([4, 5, 6])), max_tokens)
    assert kept.tolist() == lengths
    assert tokens.tolist() == list(range(sum(lengths)))


def test_an_id_outside_the_vocabulary_is_refused(write_documents):
    with pytest.raises(UserError, match="token id 100, but the vocabulary has 100"):
        write_documents([1, 2], [99, 100], vocab_size=100)
