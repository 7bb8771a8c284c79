"""The one error that is the user's to mend."""


class ConfigError(ValueError):
    """A wrong configuration or wrong data: shown as one message without a traceback, exit code 2.

    The message names the setting by its path, shows the value and the arithmetic that failed, and the way out.
    Whatever is our own mistake is an `assert` or any other exception, and leaves with its stack and exit code 1.
    """
