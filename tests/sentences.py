"""A few sentences of few words, for a tokenizer that is trained on the spot and texts that repeat."""

SENTENCES = [
    "the old man and the sea went to the quiet town in the morning",
    "she saw the green hill and the white house by the old road",
    "in the town the man was quiet and the sea was green",
    "a white bird went over the hill to the sea in the morning",
]
