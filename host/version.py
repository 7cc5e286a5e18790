"""The version of faasd; the client has the same number in its own file."""

VERSION = '0.2.0'
