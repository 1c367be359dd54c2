"""One module per command.

A module defines `SUMMARY` and `EXAMPLE` for the help, `arguments`, `execute`, which returns one JSON document, and
`show`, which prints the document for people. `KEYS` lists the config keys that matter to the command. `BRIEF` marks
commands that only read: garbage collection would take longer than they run.
"""
