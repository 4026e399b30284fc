"""The paper's tables and figures from one command: a grid of runs, their statistics, a report."""

SCALES = ("tiny", "small", "paper")
TABLES = {
    "table1": "MoxE beside dense xLSTM, Qwen1.5-MoE, Gemma 2 and a Llama of its size",
    "table2": "MoxE with one part removed or changed",
    "figures": "what the figures need: the models of Table 1, and MoxE without the group loss",
}
MOST_TOKENS = 20_000  # on a page of `moxe explore`, which would no longer scroll and search well with more
