"""The rules of the doctor, by what they read. Importing this package registers them; a new file of rules is named here."""

from groundup.env.rules import facts, gpu, installing, loading

__all__ = ["facts", "gpu", "installing", "loading"]
