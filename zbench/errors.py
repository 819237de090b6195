"""The one exception a user may see: a single clear line; the command line turns it into exit code 2."""


class UserError(Exception):
    """Bad input or an environment that cannot do what was asked. The message is one line that says what to do."""
