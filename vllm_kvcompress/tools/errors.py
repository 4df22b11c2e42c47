"""The one error that the command shows as a single line."""


class ToolError(Exception):
    """Bad input or a failed run; the message is one sentence for the user."""
