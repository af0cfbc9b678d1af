"""The command line's commands: their options and output. Each imports what it needs when it runs."""
