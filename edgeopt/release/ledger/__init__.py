"""Record every release operation in an append-only, hash-chained ledger."""
