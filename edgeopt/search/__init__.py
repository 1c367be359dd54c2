"""Search: which recipes to try, what they are predicted to cost, and which of them are best."""
