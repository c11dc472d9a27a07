"""The command line: one short module a verb; each calls one function of its room."""
