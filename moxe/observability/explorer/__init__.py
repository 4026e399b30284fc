"""The page of `moxe explore`: where the tokens of a text go in a trained model, and why."""
