"""The paper's experiments: statistics over seeds, the judgement of its claims, the report."""
