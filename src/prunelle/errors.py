"""The one exception that the command line turns into a line of text and exit code 2."""


class InputError(ValueError):
    """What the user gave cannot be used: a flag, a file, a column, a folder.

    The message is one line that says what is wrong, where, and what would be right. It is raised
    before long work starts. Errors of the project's own making are other exceptions, with a traceback.
    """
