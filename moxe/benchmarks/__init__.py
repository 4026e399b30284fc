"""Speed and memory of MoxE on this machine, beside models of equal size, one module a question (docs/benchmarks.md)."""

from __future__ import annotations

# The questions of `moxe bench`, in the order in which they are asked.
QUESTIONS = {
    "training": "how fast is a training step beside other models of equal size, and how much memory does it take",
    "cells": "how fast and how exact are the two cells beside those of the official package",
    "length": "does a token cost more in a long sequence",
    "skew": "do the experts slow down when the router prefers a few of them",
    "floor": "how far is a training step from the time its matrix products alone would take",
    "decoding": "what does a generated token cost as the context grows, and how large is what the model carries",
}
