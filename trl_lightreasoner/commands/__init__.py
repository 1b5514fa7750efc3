"""The `lightreasoner` program, one module per command.

Input: flags and YAML files. Output: the package's results, or one sentence about a mistake. Must not contain any part
of the method: every command is a few calls that a user could write.
"""
