"""The `lightreasoner` program, a module a command.

In: flags and YAML files. Out: what the package makes of them, or one sentence about a mistake. Holds no rule of the
method: every command is a few calls that a user could write.
"""
